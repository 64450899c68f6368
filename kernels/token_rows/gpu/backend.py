"""The Triton backend of the row operations; functions named and shaped as in reference.py, without gradients."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparse_forcing.kernels.token_rows.gpu.launch import plan_add_norm, plan_norm_rotate, plan_turn_time
from sparse_forcing.kernels.triton_runtime import active, register_op, why_unfit

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_why_unfit = functools.lru_cache(why_unfit)


def why_unavailable(tensor: Tensor) -> str | None:
    """Reason why the kernels cannot run on this tensor, or None."""
    if tensor.dtype not in _DTYPES:
        return f"no kernel for {tensor.dtype}"
    return _why_unfit(tensor.device)


def norm_rotate(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, L, C] -> [B, L, H, D]."""
    return _norm_rotate_op(x, weight, eps, cos, sin)


def add_norm(
    x: Tensor, update: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, *, modulates: bool
) -> tuple[Tensor, Tensor]:
    """(y, h), both [B, L, C]; every vector is of one group of tokens."""
    return _add_norm_op(x, update, gate, shift, scale, eps, modulates)


def turn_time_(keys: Tensor, frames: Tensor, frequencies: Tensor) -> None:
    """In place, of keys [..., D] with three or four dimensions before D.

    Angles are computed here, in float64 and once for all keys that share them: in a kernel cosines of any angle spill.
    """
    angles = frames.double()[..., None] * frequencies
    cos, sin = (turn.float().expand(*keys.shape[:-1], -1) for turn in (angles.cos(), angles.sin()))
    if keys.dim() == 5:  # [B, H, S, T, D], whose samples and heads lie one after the other
        keys, cos, sin = (x.flatten(0, 1) for x in (keys, cos, sin))
    _turn_time_op(keys, cos, sin)


def _norm_rotate(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    launch, out = plan_norm_rotate(x, weight, eps, cos, sin)
    if out.numel():
        with active(x.device):
            launch.run()
    return out


def _norm_rotate_fake(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], x.shape[2] // (2 * cos.shape[-1]), 2 * cos.shape[-1])


def _add_norm(
    x: Tensor, update: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, modulates: bool
) -> tuple[Tensor, Tensor]:
    launch, y, h = plan_add_norm(x, update, gate, shift, scale, eps, modulates=modulates)
    if y.numel():
        with active(x.device):
            launch.run()
    return y, h


def _add_norm_fake(x: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _turn_time(keys: Tensor, cos: Tensor, sin: Tensor) -> None:
    if keys.numel():
        with active(keys.device):
            plan_turn_time(keys, cos, sin).run()


_norm_rotate_op = register_op(
    "norm_rotate(Tensor x, Tensor weight, float eps, Tensor cos, Tensor sin) -> Tensor", _norm_rotate, _norm_rotate_fake
)
_add_norm_op = register_op(
    "add_norm(Tensor x, Tensor update, Tensor? gate, Tensor shift, Tensor scale, float eps, bool modulates)"
    " -> (Tensor, Tensor)",
    _add_norm,
    _add_norm_fake,
)
_turn_time_op = register_op("turn_time_(Tensor(a!) keys, Tensor cos, Tensor sin) -> ()", _turn_time, lambda *_: None)
