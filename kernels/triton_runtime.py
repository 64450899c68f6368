"""What the Triton backends of both operations share: the GPU, and kernel calls that can be run or only compiled."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sparse_forcing.errors import SparseForcingError

INTERPRETED = triton.knobs.runtime.interpret  # read once: Triton itself decides at import
AXIS_ENDS = 65535  # the second and third axis of a grid; the first has 2^31 - 1


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel call, complete: `run()` launches it, `compile()` only compiles it (any tensors, no GPU needed)."""

    kernel: Any
    grid: tuple[int, int, int]
    args: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def run(self) -> None:
        self.kernel[self.grid](**self.args, **self.options)

    def compile(self) -> Any:
        return self.kernel.warmup(grid=self.grid, **self.args, **self.options)


def prepare(kernel: Any, blocks: int, heads: int, args: dict[str, Any], **options: Any) -> Launch:
    """The launch of a kernel over so many blocks (or parts of them) of each head of each sample, with Triton's options.

    Neighbouring programs work on one head, whose keys stay in the cache. The kernel finds its head by `program_head`.
    """
    # Triton 3.10 turns the fusion of a multiply and an add off by default; it is 13 % of the loop here.
    options = {"enable_fp_fusion": True, **options}
    grid = (blocks, *_head_axes(heads))
    return Launch(kernel=kernel, grid=grid, args=args | {"MANY_HEADS": grid[2] > 1}, options=options)


@functools.lru_cache
def _head_axes(heads: int) -> tuple[int, int]:
    """Two axes of at most AXIS_ENDS whose product is `heads`, over all samples; kernels ask `program_head`."""
    for first in range(min(heads, AXIS_ENDS), 0, -1):
        if heads % first == 0 and heads // first <= AXIS_ENDS and heads < 2**31:
            return first, heads // first
    raise SparseForcingError(
        f"triton: batch x heads is {heads}, which is no product of two numbers up to {AXIS_ENDS}, the axes of a GPU's "
        "grid; split the batch"
    )


def why_unfit(device: torch.device) -> str | None:
    """Reason why no kernel runs on this device, or None."""
    if INTERPRETED:
        return None if device.type == "cpu" else "Triton interprets (TRITON_INTERPRET is set): use CPU tensors"
    if device.type != "cuda":
        return f"the tensor is on {device}; Triton needs a CUDA or ROCm GPU"
    if (name := target(device)).startswith("sm_") and int(name.removeprefix("sm_")) < 80:
        return "the GPU is older than compute capability 8.0"
    return None


def target(device: torch.device) -> str:
    """Architecture name in the launch tables: "sm_90", "gfx942", ...; the interpreter plays the plainest one."""
    if INTERPRETED or device.type != "cuda":
        return "interpreter"
    return _find_target(device.index if device.index is not None else torch.cuda.current_device())


@functools.lru_cache
def _find_target(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def active(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: makes it `device`, where it is not already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


LIBRARY = torch.library.Library("sparse_forcing", "FRAGMENT")


def register_op(schema: str, kernel: Callable, fake: Callable) -> Any:
    """The op of this schema, known to torch.compile and FakeTensor by its shapes, not by its launches.

    Registered as the attention is (block_sparse_attention/ops.py), because a call through custom_op costs the host
    three times as much, and a rollout makes several in every layer of every pass.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparse_forcing::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.sparse_forcing, name).default


def power_of_two(n: int) -> int:
    """The smallest that is at least n. (Triton's own can be called in kernels, too, and takes 8 microseconds.)"""
    return 1 << (n - 1).bit_length()


@triton.jit
def program_head(MANY_HEADS: tl.constexpr):
    """Number of this program's head over all samples, int64, where `prepare` laid out the grid.

    MANY_HEADS: they fill two axes. Not always, because that costs a kernel of many registers 4 % of its loop.
    """
    if MANY_HEADS:
        return (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    else:
        return tl.program_id(1).to(tl.int64)
