"""The definition of the row operations in plain torch, on any device, differentiable.

Legend: B batch, L tokens, C channels, H heads, D head dim (C = H D), G groups of tokens that share a modulation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in at least float32: torch's kernel sums in float32
    whatever its input is, so only a weight of another type needs a cast."""
    if x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    return F.rms_norm(wide, weight.shape, weight.to(wide.dtype), eps).to(x.dtype)


def layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Layer norm in at least float32 (see `rms_norm`), result in x's dtype."""
    if all(p is None or p.dtype == x.dtype for p in (weight, bias)):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    weight, bias = (None if p is None else p.to(wide.dtype) for p in (weight, bias))
    return F.layer_norm(wide, x.shape[-1:], weight, bias, eps).to(x.dtype)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm of x, times (1 + scale) plus shift per group: x [B, L, C], shift and scale [B, G, C], L a multiple of
    G. With one group in all, scale and shift are the norm's own affine part: one call."""
    if shift.shape[:2] == (1, 1):
        return layer_norm(x, eps, 1 + scale[0, 0], shift[0, 0])
    wide = layer_norm(x, eps).unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift[:, :, None], wide, 1 + scale[:, :, None]).flatten(1, 2)


def add_gated(x: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
    """x + update * gate per group, gate [B, G, C]; x + update without one."""
    if gate is None:
        return x + update
    if gate.shape[1] == 1:
        return torch.addcmul(x, update, gate)
    groups = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, groups), update.unflatten(1, groups), gate[:, :, None]).flatten(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the interleaved pairs of x [B, L, H, D] by cos and sin [L, D/2], in their dtype; the result is in x's."""
    cos, sin = cos[:, None], sin[:, None]
    if x.device.type == "cpu" and x.dtype == cos.dtype and not torch.compiler.is_compiling():
        # One complex product instead of ten calls: on a CPU a small model spends its time between calls.
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)).flatten(-2)
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def norm_rotate(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """RMS norm of x [B, L, C] over all heads together, then rotation: [B, L, H, D], cos and sin [L, D/2]."""
    return rotate(rms_norm(x, weight, eps).unflatten(-1, (-1, 2 * cos.shape[-1])), cos, sin)


def norm_rotate_pairs(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """`norm_rotate` of several x [B, L, N, C] at once, each with its own weight of [N, C]: [B, L, N, H, D]."""
    scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    normed = (x * scale).mul_(weight).unflatten(-1, (-1, cos.shape[-1], 2))
    turned = torch.view_as_complex(normed) * torch.complex(cos, sin)[:, None, None]
    return torch.view_as_real(turned).flatten(-2)


def add_norm(
    x: Tensor, update: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, *, modulates: bool
) -> tuple[Tensor, Tensor]:
    """(y, h): y = x + update * gate, h = layer norm of y times scale plus shift.

    Args:
        gate: [B, G, C], or None for 1.
        shift, scale: [B, G, C], 1 being added to the scale, where it `modulates`; else [C], the norm's own affine part.
    """
    y = add_gated(x, update, gate)
    return y, modulated_norm(y, shift, scale, eps) if modulates else layer_norm(y, eps, scale, shift)


def turn_time(keys: Tensor, frames: Tensor, frequencies: Tensor) -> Tensor:
    """[..., 2P] the first 2P dimensions of keys [..., D], their P pairs turned by frames * frequencies.

    frames: broadcastable to keys.shape[:-1]; frequencies: [P] float64, in which angles are computed.
    """
    angles = frames.double()[..., None] * frequencies
    compute = torch.float64 if keys.dtype == torch.float64 else torch.float32
    cos, sin = angles.cos().to(compute), angles.sin().to(compute)
    even, odd = keys[..., : 2 * len(frequencies)].to(compute).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(keys.dtype)
