"""Checks that have to read tensors: where they run, and how a value that cannot be used is named.

Shapes and types are always checked. Values cost nothing to read on a CPU beside an attention (microseconds, see
README.md), so there they are checked, too. On a GPU reading a value waits for everything that was launched before it:
there values are checked inside `checked_values()` only, which the tests and the benchmarks use. Nothing is read while
torch traces, captures a CUDA graph, or works on fake tensors.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor

from sparse_forcing.errors import SparseForcingError

INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)
LARGEST_SCALE = torch.finfo(torch.float32).max
_asked: ContextVar[bool | None] = ContextVar("checked_values", default=None)


class _Asking:
    """Context in which values are checked or not; a class, because it is entered in every layer of every pass."""

    def __init__(self, on: bool) -> None:
        self._on = on

    def __enter__(self) -> None:
        self._before = _asked.set(self._on)

    def __exit__(self, *_: object) -> None:
        _asked.reset(self._before)


def checked_values(on: bool = True) -> AbstractContextManager[None]:
    """Check the values of lists and sizes on every device in here; with on=False on none, the CPU included."""
    return _Asking(on)


def trusted_values() -> AbstractContextManager[None]:
    """Check no values in here, unless somebody outside asked for it: for lists that are right by their making."""
    return nullcontext() if _asked.get() else _Asking(False)


def reads_values(x: Tensor) -> bool:
    """Whether the values of x are to be checked here."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type == "meta":
        return False
    asked, on_cpu = _asked.get(), x.device.type == "cpu"
    if asked is None:
        return on_cpu
    return asked and (on_cpu or not torch.cuda.is_current_stream_capturing())


def require_tensors(operation: str, *, optional: tuple[str, ...] = (), **arguments: object) -> None:
    """Refuse arguments that are no dense tensors, such as lists of Python; `optional` ones may be None."""
    for name, x in arguments.items():
        if x is None and name in optional:
            continue
        if not isinstance(x, Tensor):
            raise SparseForcingError(f"{operation}: {name} is a {type(x).__name__}, expected a tensor")
        if x.layout is not torch.strided:
            raise SparseForcingError(f"{operation}: {name} has the layout {x.layout}, expected a dense tensor")


def require_integers(operation: str, name: str, x: Tensor) -> None:
    """Refuse a tensor that is not of whole numbers: a mask or a score is easily taken for a list of slots."""
    if x.dtype not in INTEGERS:
        raise SparseForcingError(
            f"{operation}: {name} is {list(x.shape)} {x.dtype}, expected whole numbers, such as torch.int32"
        )


def require_range(operation: str, name: str, x: Tensor, least: int, most: int, meaning: str) -> None:
    """Refuse values of x outside least..most, where values are read."""
    if not reads_values(x) or not x.numel():
        return
    low, high = (int(value) for value in x.aminmax())
    if low < least or high > most:
        raise SparseForcingError(
            f"{operation}: {name} holds {high if high > most else low}, expected {least} to {most}: {meaning}"
        )


def require_scale(operation: str, scale: float | None, head_dim: int) -> float:
    """The factor on the scores: 1 / sqrt(head_dim) where None, else positive and finite."""
    if scale is None:
        return head_dim**-0.5
    try:
        scale = float(scale) if hasattr(scale, "__float__") else math.nan  # text has none
    except (ValueError, OverflowError, RuntimeError):  # of several numbers, or beyond all bounds
        scale = math.inf
    if not 0 < scale <= LARGEST_SCALE:
        raise SparseForcingError(f"{operation}: scale is {scale}, expected a positive, finite number or None")
    return scale
