"""Rotary positions of Wan 2.1: interleaved pairs, the head dimension split over time, rows and columns.

A head of D dimensions gives D - 4*(D//6) of them to time and 2*(D//6) each to rows and columns; each axis has its own
frequencies theta^(-2i/d). Angles are computed in float64, as the reference does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_forcing.kernels.token_rows.interface import rotate, turn_time_
from sparse_forcing.kernels.token_rows.reference import turn_time
from sparse_forcing.model.remembered import remember

THETA = 10_000.0


class Rotary(NamedTuple):
    """A rotary table: cos and sin, each [L, D/2]."""

    cos: Tensor
    sin: Tensor

    def permute(self, order: Tensor) -> Rotary:
        return Rotary(self.cos[order], self.sin[order])


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Dimensions of a head given to time, rows and columns."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


@remember
def _frequencies(dim: int, device: torch.device) -> Tensor:
    return THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)


def rotary_table(frames: Tensor, rows: int, cols: int, head_dim: int, dtype: torch.dtype = torch.float32) -> Rotary:
    """Angles of every token of a grid, frame-major.

    Args:
        frames: [F] positions in time (latent frames; any number, also fractional or negative).
        dtype: type of the result; float64 for float64 models, otherwise float32.
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
    return rotate(x, rotary.cos, rotary.sin)


def shift_time(keys: Tensor, frames: Tensor) -> Tensor:
    """Move rotated keys in time: keys [..., D] rotated at frame p come out as rotated at frame p + frames.

    Args:
        keys: [..., D] after `apply_rotary`.
        frames: broadcastable to keys.shape[:-1]; latent frames to move by.
    """
    moved = turn_time(keys, frames, _time_frequencies(keys))
    return torch.cat([moved, keys[..., moved.shape[-1] :]], -1)


def shift_time_(keys: Tensor, frames: Tensor) -> None:
    """`shift_time` in place."""
    turn_time_(keys, frames, _time_frequencies(keys))


def _time_frequencies(keys: Tensor) -> Tensor:
    return _frequencies(axis_dims(keys.shape[-1])[0], keys.device)
