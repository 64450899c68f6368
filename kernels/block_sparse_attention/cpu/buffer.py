"""Scratch memory of the CPU backend, kept between calls."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

KEPT_VIEWS = 32  # shapes of a buffer that are remembered


class Buffer:
    """Scratch memory of one type for one purpose, kept between pieces and calls.

    It stays in the cache and costs no page faults; fresh memory for every call took a quarter of a small call's time.
    At most the budget of a piece, or the rows of the largest call.
    """

    _kept = threading.local()  # its __dict__ is the running thread's

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self._memory = torch.empty(0, dtype=dtype)
        self._views: dict[tuple[int, ...], Tensor] = {}

    @classmethod
    def of(cls, purpose: str, dtype: torch.dtype) -> Buffer:
        """This thread's buffer for a purpose."""
        kept = cls._kept.__dict__
        key = f"{purpose}, {dtype}"
        if key not in kept:
            kept[key] = cls(dtype)
        return kept[key]

    def view(self, *shape: int) -> Tensor:
        """Contiguous tensor of this shape with undefined contents."""
        view = self._views.get(shape)
        if view is not None:
            return view
        size = math.prod(shape)
        if self._memory.numel() < size or len(self._views) >= KEPT_VIEWS:
            self._views.clear()
        with torch.inference_mode(False):  # an inference tensor could not be written in a later, normal call
            if self._memory.numel() < size:
                self._memory = torch.empty(size, dtype=self.dtype)
            self._views[shape] = self._memory[:size].view(shape)
        return self._views[shape]

    def hold(self, x: Tensor) -> Tensor:
        """x in this buffer's type: x itself when it has it."""
        return x if x.dtype == self.dtype else self.view(*x.shape).copy_(x)

    def bmm(self, a: Tensor, b: Tensor, factor: float = 1) -> Tensor:
        """factor * a @ b, batched, of factors of this buffer's type."""
        return self.view(a.shape[0], a.shape[1], b.shape[2]).baddbmm_(a, b, beta=0, alpha=factor)
