"""Which device to compute on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sparse_forcing.errors import ConfigError, SparseForcingError

if TYPE_CHECKING:
    import torch

_NO_MEMORY = (
    "out of memory", "annot allocate memory", "can't allocate memory", "not enough memory", "bad_alloc",
    "Storage size calculation overflowed",
)  # fmt: skip
"""What torch says then, on a GPU, on a CPU, or of a size beyond any memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, of the machine or of a device, did not suffice."""
    return isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, OSError)) and any(words in str(error) for words in _NO_MEMORY)
    )


@contextmanager
def explain_memory_shortage(while_: str) -> Iterator[None]:
    """Running out of memory while a model is loaded or reads text becomes a SparseForcingError that says what helps.

    Args:
        while_: a clause that says what was going on.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise SparseForcingError(
            f"out of memory while {while_}; --dtype bfloat16 (torch_dtype) halves what float32 weights take, "
            "--weights int8 (weights) that of bfloat16, and --text-encoder-device cpu leaves a GPU to the rest"
        ) from error


def resolve_device(name: str, setting: str = "--device") -> str:
    """`auto` picks the GPU where there is one; a device that is not there is a ConfigError, never a silent fallback.

    Args:
        setting: the user's name for it, for the error message.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # read back: the device `meta` computes nothing
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        reason = (str(error).splitlines() or ["unknown"])[0]
        raise ConfigError(
            f"{setting} {name}: not usable with torch {torch.__version__} here ({reason:.120})"
        ) from error
    return str(device)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 saves time there: on GPUs, and on CPUs for which oneDNN multiplies it. On others, those without
    AVX-512, torch's products of it are many times slower than those of float32."""
    from sparse_forcing.kernels.block_sparse_attention.cpu import arithmetic as cpu_arithmetic

    return device.type != "cpu" or cpu_arithmetic.multiplies_bfloat16()


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that a setting `float32`, `bfloat16` or `auto` (bfloat16 where that saves time) means on a device."""
    import torch

    half = name == "bfloat16" or (name == "auto" and multiplies_bfloat16(device))
    return torch.bfloat16 if half else torch.float32
