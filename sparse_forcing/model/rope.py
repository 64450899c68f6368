"""Rotary positions of Wan 2.1: interleaved pairs, the head dimension split over time, rows and columns.

A head of D dimensions gives D - 4*(D//6) of them to time and 2*(D//6) each to rows and columns; each axis has its own
frequencies theta^(-2i/d). Angles are computed in float64, as the reference does.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10_000.0
SHIFT_AT_ONCE = 1 << 24
"""Numbers of a key cache that are moved in time at once: what that takes beside them stays small."""


class Rotary(NamedTuple):
    """cos and sin, each [L, D/2]."""

    cos: Tensor
    sin: Tensor

    def permute(self, order: Tensor) -> Rotary:
        return Rotary(self.cos[order], self.sin[order])


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Dimensions of a head given to time, rows and columns."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


@lru_cache(maxsize=64)
def _frequencies(dim: int, device: torch.device) -> Tensor:
    return THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)


def rotary_table(frames: Tensor, rows: int, cols: int, head_dim: int, dtype: torch.dtype = torch.float32) -> Rotary:
    """Angles of every token of a grid, frame-major.

    Args:
        frames: [F] positions in time (latent frames; any number, also fractional or negative).
        dtype: of the result; float64 for float64 models, otherwise float32.
    """
    device = frames.device
    dims = axis_dims(head_dim)
    positions = (frames.double(), torch.arange(rows, device=device), torch.arange(cols, device=device))
    time, row, col = (p.double()[:, None] * _frequencies(d, device) for p, d in zip(positions, dims))
    shape = (len(frames), rows, cols, -1)
    angles = torch.cat(
        [time[:, None, None].expand(shape), row[None, :, None].expand(shape), col[None, None].expand(shape)], -1
    ).flatten(0, 2)
    return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))


def apply_rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate [B, L, H, D] (or any [..., D] that broadcasts with [L, 1, D/2]) and return x's dtype."""
    cos, sin = rotary.cos[:, None], rotary.sin[:, None]
    if x.device.type == "cpu" and x.dtype == cos.dtype and not torch.compiler.is_compiling():
        # One complex product instead of ten calls: on a CPU a small model spends its time between calls.
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)).flatten(-2)
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def shift_time(keys: Tensor, frames: Tensor) -> Tensor:
    """Move rotated keys in time: keys [..., D] rotated at frame p come out as rotated at frame p + frames.

    Args:
        keys: [..., D] after `apply_rotary`.
        frames: broadcastable to keys.shape[:-1]; latent frames to move by.
    """
    moved = _time_moved(keys, frames)
    return torch.cat([moved, keys[..., moved.shape[-1] :]], -1)


@torch.no_grad()
def shift_time_(keys: Tensor, frames: Tensor) -> None:
    """`shift_time` in place, a part of the first dimension at a time."""
    at_once = max(1, SHIFT_AT_ONCE // max(keys[:1].numel(), 1))
    own = frames.dim() == keys.dim() - 1 and len(frames) == len(keys)
    for part, by in zip(keys.split(at_once), frames.split(at_once) if own else repeat(frames)):
        moved = _time_moved(part, by)
        part[..., : moved.shape[-1]] = moved


def _time_moved(keys: Tensor, frames: Tensor) -> Tensor:
    """[..., dimensions given to time] of `shift_time`."""
    time_dim = axis_dims(keys.shape[-1])[0]
    angles = frames.double()[..., None] * _frequencies(time_dim, keys.device)
    compute = torch.float64 if keys.dtype == torch.float64 else torch.float32
    cos, sin = angles.cos().to(compute), angles.sin().to(compute)
    even, odd = keys[..., :time_dim].to(compute).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(keys.dtype)
