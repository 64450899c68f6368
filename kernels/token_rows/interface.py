"""Entry points of the row operations: the plain definition, or on a GPU without gradients one kernel for each.

Legend: see reference.py. Between a block's products everything is bound by memory: a kernel reads every row once and
writes it once, where the plain calls do so four to ten times.
"""

from __future__ import annotations

import importlib
from itertools import repeat
from types import ModuleType

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.kernels.token_rows import reference
from sparse_forcing.kernels.token_rows.reference import (
    add_gated,
    layer_norm,
    modulated_norm,
    norm_rotate_pairs,
    rms_norm,
    rotate,
)

__all__ = [
    "add_gated",
    "add_norm",
    "layer_norm",
    "modulated_norm",
    "norm_rotate",
    "norm_rotate_pairs",
    "rms_norm",
    "rotate",
    "turn_time_",
    "why_unavailable",
]
BACKENDS = ("auto", "triton", "reference")
TURN_AT_ONCE = 1 << 24
"""Numbers that the reference turns at once: what that takes beside them stays small."""


def norm_rotate(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> Tensor:
    """RMS norm of x [B, L, C] with weight [C], then rotation by cos and sin [L, D/2] -> [B, L, H, D]."""
    module = _backend(backend, x, weight)
    return module.norm_rotate(x, weight, eps, cos, sin)


def add_norm(
    x: Tensor,
    update: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    *,
    modulates: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(x + update * gate, its layer norm times scale plus shift) of x and update [B, L, C]; see reference.add_norm."""
    one_group = all(part is None or part.dim() == 1 or part.shape[1] == 1 for part in (gate, shift, scale))
    module = _backend(backend if one_group else "reference", x, update, scale)
    return module.add_norm(x, update, gate, shift, scale, eps, modulates=modulates)


@torch.no_grad()
def turn_time_(keys: Tensor, frames: Tensor, frequencies: Tensor, *, backend: str = "auto") -> None:
    """Turn the first pairs of keys [..., D], in place, by frames * frequencies [P] (see reference.turn_time)."""
    if _backend(backend, keys) is not reference:
        return _triton().turn_time_(keys, frames, frequencies)
    at_once = max(1, TURN_AT_ONCE // max(keys[:1].numel(), 1))
    own = frames.dim() == keys.dim() - 1 and len(frames) == len(keys)
    for part, by in zip(keys.split(at_once), frames.split(at_once) if own else repeat(frames)):
        part[..., : 2 * len(frequencies)] = reference.turn_time(part, by, frequencies)
    return None


def why_unavailable(backend: str, tensor: Tensor) -> str | None:
    """Reason why `backend` cannot run on this tensor, or None when it can."""
    if backend == "reference":
        return None
    try:
        return _triton().why_unavailable(tensor)
    except ImportError as error:
        return f"import failed: {error}"


def _triton() -> ModuleType:
    return importlib.import_module("sparse_forcing.kernels.token_rows.gpu.backend")


def _backend(backend: str, *tensors: Tensor) -> ModuleType:
    """The kernels where they can run: they have no gradient, and their tensors are of one type."""
    x = tensors[0]
    if backend not in BACKENDS:
        raise ConfigError(f"token rows: unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        fits = x.device.type != "cpu" and all(part.dtype == x.dtype for part in tensors)
        differentiates = torch.is_grad_enabled() and any(part.requires_grad for part in tensors)
        if not fits or differentiates or torch.compiler.is_compiling():
            return reference
        return _triton() if why_unavailable("triton", x) is None else reference
    reason = why_unavailable(backend, x)
    if reason is not None:
        raise ConfigError(f"token rows: backend {backend!r} cannot run here: {reason}")
    return _triton() if backend == "triton" else reference
