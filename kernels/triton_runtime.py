"""What the Triton backends of both operations share: the GPU they run on, and kernel calls that can be run or compiled.

Every grid has one axis, of up to 2^31 - 1 programs: the others end at 65535, which batch times heads may pass.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sparse_forcing.errors import SparseForcingError

INTERPRETED = triton.knobs.runtime.interpret  # read once: Triton itself decides at import
MAX_PROGRAMS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel call, complete: `run()` launches it, `compile()` only compiles it (any tensors, no GPU needed)."""

    kernel: Any
    programs: int
    args: dict[str, Any]
    options: dict[str, Any]

    def __post_init__(self) -> None:
        if self.programs > MAX_PROGRAMS:
            raise SparseForcingError(
                f"{self.name} (triton): {self.programs} blocks over all samples and heads, a launch takes at most "
                f"{MAX_PROGRAMS}: use a smaller batch or backend='reference'"
            )

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.args, **self.options)

    def compile(self) -> Any:
        return self.kernel.warmup(grid=(self.programs,), **self.args, **self.options)


def prepare(kernel: Any, programs: tuple[int, ...], args: dict[str, Any], **options: Any) -> Launch:
    """The launch of a kernel over so many programs, given by factors, with Triton's `options`."""
    # Triton 3.10 turns the fusion of a multiply and an add off by default; it is 13 % of the loop here.
    options = {"enable_fp_fusion": True, **options}
    return Launch(kernel=kernel, programs=math.prod(programs), args=args, options=options)


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
    return _target_of(device.index if device.index is not None else torch.cuda.current_device())


@functools.lru_cache
def _target_of(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def active(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: makes it `device`, where it is not already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def power_of_two(n: int) -> int:
    """The smallest that is at least n. (Triton's own can be called in kernels, too, and takes 8 microseconds.)"""
    return 1 << (n - 1).bit_length()


@triton.jit
def head_and_block(blocks, PARTS: tl.constexpr):
    """(head over all samples, int64; block of that head, part of the block) of this program; its heads have `blocks`
    blocks of PARTS parts each. One axis for all: the others of a grid end at 65535."""
    program = tl.program_id(0)
    head, place = program // (blocks * PARTS), program % (blocks * PARTS)
    return head.to(tl.int64), place // PARTS, place % PARTS
