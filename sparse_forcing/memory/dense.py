"""Dense memories at the granularity of frames: full, window, window and sink."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_forcing.memory.base import MemoryGeometry, RolloutMemory
from sparse_forcing.memory.config import MemoryConfig
from sparse_forcing.model.attention import dense_attention
from sparse_forcing.model.rope import shift_time


@dataclass
class DenseLayer:
    """Keys (rotated) and values [B, capacity, H, D] of one layer, in cache order."""

    keys: Tensor
    values: Tensor


class DenseMemory(RolloutMemory):
    """Every cached token is visible to the current chunk."""

    def __init__(self, config: MemoryConfig, geometry: MemoryGeometry, cache_gradient: str = "none") -> None:
        super().__init__(config, geometry, cache_gradient)
        self.layers: list[DenseLayer | None] = [None] * geometry.num_layers
        self.positions: list[int] = []
        self._floors: list[int] = []

    @property
    def cached_frames(self) -> int:
        """Whole frames before the current chunk."""
        return len(self.positions)

    @property
    def cached_tokens(self) -> int:
        """Tokens before the current chunk."""
        return self.cached_frames * self.geometry.tokens_per_frame

    def cached(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, tokens, H, D] in cache order, the current chunk last."""
        state = self.layers[layer]
        assert state is not None, "nothing cached yet"
        end = self.cached_tokens + self.chunk_frames * self.geometry.tokens_per_frame
        return state.keys[:, :end], state.values[:, :end]

    def _make_room(self, frames: int) -> None:
        for offset in range(self.chunk_frames):
            self._floors.append(self.cached_frames if self.cached_frames < self.config.sink else offset)
            self.positions.append(self.chunk_position + offset)
        if self.config.window is None:
            return
        drop = self.cached_frames + frames - self.config.window
        if drop > 0:
            sink = self.config.sink
            self._drop(sink, min(sink + drop, self.cached_frames))

    def _drop(self, first: int, last: int) -> None:
        """Forget the cached frames first..last-1."""
        n, kept = self.geometry.tokens_per_frame, self.cached_frames - last
        for state in filter(None, self.layers):
            for name in ("keys", "values"):
                x = getattr(state, name)
                rest = x[:, last * n : (last + kept) * n]
                if self.cache_gradient == "none":
                    x[:, first * n : (first + kept) * n] = rest.clone()
                else:
                    setattr(state, name, torch.cat([x[:, : first * n], rest], 1))
        del self.positions[first:last], self._floors[first:last]

    def _move_positions(self, frames: int) -> None:
        moved = [max(p + frames, floor) for p, floor in zip(self.positions, self._floors)]
        n, end = self.geometry.tokens_per_frame, self.cached_tokens
        delta = torch.tensor([new - old for new, old in zip(moved, self.positions)]).repeat_interleave(n)[:, None]
        for layer, state in enumerate(self.layers):
            if state is None:
                continue
            past = state.keys[:, :end]
            delta = delta.to(past.device)  # once: the layers share a device
            keys = shift_time(past, self._shifts(layer, frames, delta))
            if self.cache_gradient == "none":
                past.copy_(keys)
            else:
                state.keys = torch.cat([keys, state.keys[:, end:]], 1)
        self.positions = moved

    def _shifts(self, layer: int, frames: int, delta: Tensor) -> Tensor:
        """Frames to move each cached key by, broadcastable to [B, tokens, H], given `delta` of the whole frames."""
        return delta

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, clean: bool,
        choices: dict[int, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        start = self.cached_tokens
        end = start + key.shape[1]
        if self.cache_gradient != "none":
            return self._attend_out_of_place(layer, query, key, value, start, clean)
        state = self._room(layer, key, start, end)
        state.keys[:, start:end] = key
        state.values[:, start:end] = value
        return dense_attention(query, state.keys[:, :end], state.values[:, :end])

    def _attend_out_of_place(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, start: int, clean: bool
    ) -> Tensor:
        """The same where autograd may hold the cache: the layer gets new tensors and a new state."""
        old = self.layers[layer] or DenseLayer(key.new_empty(0, 0), value.new_empty(0, 0))
        pairs = ((old.keys, key), (old.values, value))
        with self.history():
            keys, values = (torch.cat([x[:, :start], new], 1) if start else new for x, new in pairs)
        out = dense_attention(query, keys, values)
        if clean:
            with self.history():
                keys, values = (torch.cat([x[:, :start], self.merge_clean(x[:, start:], new)], 1) for x, new in pairs)
        self.layers[layer] = DenseLayer(keys, values)
        return out

    def _room(self, layer: int, key: Tensor, start: int, end: int) -> DenseLayer:
        """The layer's buffers, made or grown to hold `end` tokens."""
        state = self.layers[layer]
        if state is not None and state.keys.shape[1] >= end:
            return state
        capacity = max(end, self._known_capacity, 0 if state is None else 3 * start // 2)
        shape = (key.shape[0], capacity, *key.shape[2:])
        grown = DenseLayer(key.new_zeros(shape), key.new_zeros(shape))
        if state is not None:
            grown.keys[:, :start], grown.values[:, :start] = state.keys[:, :start], state.values[:, :start]
        self.layers[layer] = grown
        return grown

    @property
    def _known_capacity(self) -> int:
        """Tokens the memory will hold, as far as that is known."""
        return (self.config.window or self.geometry.capacity_frames or 0) * self.geometry.tokens_per_frame

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cached entries, the current chunk's included; a buffer's spare room does not count."""
        end = self.cached_tokens + self.chunk_frames * self.geometry.tokens_per_frame
        return sum(x[:, :end].nbytes for state in filter(None, self.layers) for x in (state.keys, state.values))
