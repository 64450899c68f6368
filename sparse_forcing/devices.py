"""Which device to compute on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparse_forcing.errors import ConfigError

if TYPE_CHECKING:
    import torch


def resolve_device(name: str, setting: str = "--device") -> str:
    """`auto` picks the GPU where there is one; a device that is not there is a ConfigError, never a silent fallback.

    Args:
        setting: what the user called it, for the error message.
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
