"""How much memory a computation takes at its peak, without doing it: its operations run on tensors without storage."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels of a GPU do it: its result, and no matrix of scores."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))


class _Live(TorchDispatchMode):
    """Counts the bytes of storages that were made inside it and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.device.type == "meta":
                storage = x.untyped_storage()
                if storage._cdata not in given and storage not in self._known:
                    self._known.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._forget, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _forget(self, size: int) -> None:
        self.now -= size


@torch.no_grad()
def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes of tensors on the device `meta` that `work` makes and holds at once, its result included."""
    with _FusedAttention(), _Live() as live:
        result = work()
        peak = live.peak
        del result
    return peak
