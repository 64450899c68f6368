"""What a self-attention layer sees: everything, a frame mask, or a rollout memory (sparse_forcing.memory).

Legend: B batch, L tokens, H heads, D head dimension, F latent frames, N tokens per frame.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_forcing.model.rope import Rotary, rotary_table


class TokenOrder(NamedTuple):
    """An order of tokens: [L] the frame-major token at each place, and [L] the place of each frame-major token."""

    order: Tensor
    inverse: Tensor

    def arrange(self, tokens: Tensor) -> Tensor:
        """Frame-major tokens [B, L, C] in this order."""
        return _take(tokens, self.order, self.inverse)

    def restore(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L, C] in this order, frame-major again."""
        return _take(tokens, self.inverse, self.order)


def _take(tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    if tokens.requires_grad and torch.is_grad_enabled():
        return _Permutation.apply(tokens, order, inverse)
    return tokens[:, order]


class _Permutation(torch.autograd.Function):
    """tokens[:, order], whose gradient is taken back by the inverse order: autograd, which cannot know that no place is
    taken twice, would add up what comes from each."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return tokens[:, order]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _take(grads[0], inverse, order), None, None


class AttentionPolicy(Protocol):
    """Decides, for one forward pass, the positions of its tokens and the keys each of them attends to."""

    def token_order(self, device: torch.device) -> TokenOrder | None:
        """The order that the layers work in (tile order), or None for frame-major."""
        ...

    def rotary(self, rows: int, cols: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Rotary:
        """Rotary table of this pass's tokens, in their order."""
        ...

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """[B, L, H, D] after norm and rotation -> [B, L, H, D]; None where the pass ends: all there is of it lies with
        the policy, and the model computes nothing more."""
        ...


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of [B, L, H, D] over all keys [B, Lk, H, D].

    On a CPU, bfloat16 inputs are computed in float32: torch's kernel there is faster that way and more exact.
    """
    dtype = query.dtype
    if query.device.type == "cpu" and dtype == torch.bfloat16:
        query, key, value = query.float(), key.float(), value.float()
    with without_autocast(query.device):
        out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2).to(dtype)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off, where it is on: its context costs a small model's attention a tenth of its time."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class ParallelAttention:
    """All frames at once: bidirectional, or restricted by a frame mask (diffusion and teacher forcing).

    Args:
        num_frames: latent frames in the token sequence.
        frame_mask: [F, F] bool, row = query frame, True = visible; None = every frame sees every frame.
        positions: [F] positions in time; 0..F-1 when None.
    """

    def __init__(self, num_frames: int, frame_mask: Tensor | None = None, positions: Tensor | None = None) -> None:
        self.num_frames = num_frames
        self.positions = torch.arange(num_frames) if positions is None else positions
        self.groups = None if frame_mask is None else _equal_rows(frame_mask)

    @classmethod
    def teacher_forcing(cls, chunks: list[int], *, window: int | None = None) -> ParallelAttention:
        """The policy of the sequence [clean | noisy] of the same frames (see teacher_forcing_mask)."""
        frames = sum(chunks)
        return cls(2 * frames, teacher_forcing_mask(chunks, window=window), torch.arange(frames).repeat(2))

    def token_order(self, device: torch.device) -> None:
        """None: frame-major."""
        return None

    def rotary(self, rows: int, cols: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Rotary:
        """Rotary table of all tokens, frame by frame."""
        return rotary_table(self.positions.to(device), rows, cols, head_dim, dtype)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention [B, L, H, D] of all frames, each over the frames it may see; every layer sees the same."""
        if self.groups is None:
            return dense_attention(query, key, value)
        # Frames with equal rows attend together without a mask: cheaper than one masked call on every backend.
        q, k, v = (x.unflatten(1, (self.num_frames, -1)) for x in (query, key, value))
        parts = []
        for first, last, visible in self.groups:
            keys, values = (_take_frames(x, visible).flatten(1, 2) for x in (k, v))
            parts.append(dense_attention(q[:, first:last].flatten(1, 2), keys, values))
        return torch.cat(parts, 1)


def _equal_rows(frame_mask: Tensor) -> list[tuple[int, int, list[int]]]:
    """Runs of query frames with the same visible frames: (first, last + 1, visible frames)."""
    rows = [tuple(row.nonzero().flatten().tolist()) for row in frame_mask]
    groups, start = [], 0
    for visible, run in groupby(rows):
        length = len(list(run))
        groups.append((start, start + length, list(visible)))
        start += length
    return groups


def _take_frames(x: Tensor, frames: list[int]) -> Tensor:
    """x[:, frames], as a view when they are consecutive."""
    if frames and frames[-1] - frames[0] + 1 == len(frames):
        return x[:, frames[0] : frames[-1] + 1]
    return x[:, frames]


def block_causal_mask(chunks: list[int], *, window: int | None = None, sink: int = 0) -> Tensor:
    """[F, F] mask: bidirectional inside a chunk, causal between chunks.

    Args:
        chunks: latent frames of each chunk.
        window: visible frames counted back from the chunk's end, the chunk itself and the sink included (None: all).
        sink: first frames of the video that stay visible.
    """
    total = sum(chunks)
    mask = torch.zeros(total, total, dtype=torch.bool)
    end = 0
    for size in chunks:
        start, end = end, end + size
        first = 0 if window is None else max(0, end - max(window - sink, size))
        mask[start:end, first:end] = True
        if window is not None:
            mask[start:end, : min(sink, end)] = True
    return mask


def teacher_forcing_mask(chunks: list[int], *, window: int | None = None, sink: int = 0) -> Tensor:
    """[2F, 2F] mask of the sequence [clean | noisy]: clean chunk i sees clean chunks <= i, noisy chunk i sees clean
    chunks < i and itself, both within `window` and `sink` (see block_causal_mask)."""
    total = sum(chunks)
    causal = block_causal_mask(chunks, window=window, sink=sink)
    own = torch.block_diag(*[torch.ones(size, size, dtype=torch.bool) for size in chunks]).bool()
    nothing = torch.zeros(total, total, dtype=torch.bool)
    return torch.cat([torch.cat([causal, nothing], 1), torch.cat([causal & ~own, own], 1)])
