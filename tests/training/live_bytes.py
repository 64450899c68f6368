"""Bytes of the tensors that are alive, and the most there were: what an allocator would report, for a CPU too."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_forcing.kernels.block_sparse_attention.cpu.buffer import Buffer


class LiveBytes(TorchDispatchMode):
    """Counts every storage that operations inside the block return, until it is freed, beside those given before.

    What a custom operation allocates and frees inside itself is not seen. Scratch memory that the CPU kernels keep
    counts as given before.
    """

    def __init__(self, before: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0
        for x in (*before, *(buffer._memory for buffer in Buffer._kept.__dict__.values())):
            self._add(x)

    def _add(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.alive or not storage.nbytes():
            return
        self.alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._add(x)
        return out
