"""How much memory a computation takes at its peak, without doing it: its operations run on tensors without storage."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_BLOCK = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
"""Channels of a block: as many float32 numbers as a register holds."""
_COLUMNS_UNTIL = 20480
"""Channels x the next two sizes of a single sample up to which torch convolves by columns, with kernels this small."""
_SMALL_KERNEL = 3


class _FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels of a GPU do it: its result, and no matrix of scores."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))


def _convolution_scratch(x: Tensor, weight: Tensor, out: Tensor) -> int:
    """Bytes that torch takes beside `out` to convolve float32 on a CPU; kernels of one number are plain products.

    Small inputs are laid out as columns: for each place of the result all numbers that it is made of. Others go to
    oneDNN: a copy of the input whose channels lie in blocks, while the result lies in such blocks, too.
    """
    if x.dtype != torch.float32 or weight[0, 0].numel() == 1:
        return 0
    single = len(x) == 1 and x.shape[1] == weight.shape[1]  # one sample, one group
    if single and min(weight.shape[-2:]) <= _SMALL_KERNEL and math.prod(x.shape[:4]) <= _COLUMNS_UNTIL:
        return out.nbytes // out.shape[1] * weight[0].numel()
    held, made = (y.nbytes // y.shape[1] * math.ceil(y.shape[1] / _BLOCK) * _BLOCK for y in (x, out))
    return max(held + made - out.nbytes, made)


class _Live(TorchDispatchMode):
    """Counts the bytes of storages that were made inside it and are still alive, and what kernels of a device take
    besides while they run."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._on_cpu = device.startswith("cpu")
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
        scratch = 0
        if self._on_cpu and function is torch.ops.aten.convolution.default:
            scratch = _convolution_scratch(args[0], args[1], out)
        self.peak = max(self.peak, self.now + scratch)
        return out

    def _forget(self, size: int) -> None:
        self.now -= size


@torch.no_grad()
def peak_bytes(work: Callable[[], object], device: str) -> int:
    """Most bytes that `work`, which is on tensors of the device `meta`, would make and hold at once on `device`, its
    result included."""
    with _FusedAttention(), _Live(device) as live:
        result = work()
        peak = live.peak
        del result
    return peak
