"""Dense memories at the granularity of frames: full, window, window and sink."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_forcing.memory.base import REWRITTEN, Choices, MemoryGeometry, RolloutMemory
from sparse_forcing.memory.config import MemoryConfig
from sparse_forcing.model.attention import dense_attention
from sparse_forcing.model.rope import shift_time, shift_time_

DROP_AT_ONCE = 1 << 26
"""Numbers that are moved at once when frames are forgotten: a copy of so many lies beside the cache."""


@dataclass
class DenseLayer:
    """Keys (rotated) and values [B, capacity, H, D] of one layer, or of all, whose samples then follow one another."""

    keys: Tensor
    values: Tensor


class DenseMemory(RolloutMemory):
    """Every cached token is visible to the current chunk."""

    def __init__(self, config: MemoryConfig, geometry: MemoryGeometry, cache_gradient: str = "none") -> None:
        super().__init__(config, geometry, cache_gradient)
        self.layers: list[DenseLayer | None] = [None] * geometry.num_layers
        self._all: DenseLayer | None = None  # what `layers` are parts of, where they are written in place
        self.positions: list[int] = []
        self._floors: list[int] = []
        self._moves: tuple[list[int], Tensor] | None = None

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
        self._keep_current()
        if self.config.window is None:
            return
        drop = self.cached_frames + frames - self.config.window
        if drop > 0:
            sink = self.config.sink
            self._drop(sink, min(sink + drop, self.cached_frames))

    def _keep_current(self) -> None:
        """The current chunk becomes one of those before it."""
        for offset in range(self.chunk_frames):
            self._floors.append(self.cached_frames if self.cached_frames < self.config.sink else offset)
            self.positions.append(self.chunk_position + offset)

    def begin_again(self, frames: int) -> None:
        self._keep_current()
        super().begin_again(frames)

    def _rewind(self, chunks: Sequence[int]) -> int:
        if self.config.kind not in REWRITTEN:
            return super()._rewind(chunks)
        frames, count = self.cached_frames + self.chunk_frames, 0
        while count < len(chunks) and sum(chunks[-count - 1 :]) <= frames - self.config.sink:
            count += 1
        kept = frames - sum(chunks[-count:]) if count else self.cached_frames
        del self.positions[kept:], self._floors[kept:]
        return count

    def _together(self) -> list[tuple[int, DenseLayer]]:
        """(number, state) of the layers there are; in place all are one, with number -1."""
        if self._all is not None:
            return [(-1, self._all)]
        return [(layer, state) for layer, state in enumerate(self.layers) if state is not None]

    @property
    def shapes(self) -> Hashable:
        if self._all is None:
            return None
        return self.chunk_frames, self.cached_tokens, self._all.keys.data_ptr()

    def _drop(self, first: int, last: int) -> None:
        """Forget the cached frames first..last-1."""
        n, kept = self.geometry.tokens_per_frame, self.cached_frames - last
        for _, state in self._together():
            for name in ("keys", "values"):
                x = getattr(state, name)
                if self.cache_gradient == "none":
                    for part in x.split(max(1, DROP_AT_ONCE // x[:1].numel())):
                        part[:, first * n : (first + kept) * n] = part[:, last * n : (last + kept) * n].clone()
                else:
                    setattr(state, name, torch.cat([x[:, : first * n], x[:, last * n : (last + kept) * n]], 1))
        del self.positions[first:last], self._floors[first:last]

    def _move_positions(self, frames: int) -> None:
        moved = [max(p + frames, floor) for p, floor in zip(self.positions, self._floors)]
        end = self.cached_tokens
        delta = self._by_token([new - old for new, old in zip(moved, self.positions)])
        for layer, state in self._together():
            past = state.keys[:, :end]
            shifts = self._shifts(layer, frames, delta)
            if self.cache_gradient == "none":
                shift_time_(past, shifts)
            else:
                state.keys = torch.cat([shift_time(past, shifts), state.keys[:, end:]], 1)
        self.positions = moved

    def _by_token(self, numbers: list[int]) -> Tensor:
        """[frames * tokens, 1] numbers of whole frames beside the cache; while they are the same, the same tensor."""
        if self._moves is None or self._moves[0] != numbers:
            _, state = self._together()[0]
            table = torch.tensor(numbers).repeat_interleave(self.geometry.tokens_per_frame)[:, None]
            self._moves = numbers, table.to(state.keys.device)
        return self._moves[1]

    def _shifts(self, layer: int, frames: int, delta: Tensor) -> Tensor:
        """Frames to move each cached key by, broadcastable to [B, tokens, H], given `delta` of the whole frames."""
        return delta

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        clean: bool,
        choices: Choices | None = None,
        ends: bool = False,
    ) -> Tensor | None:
        start = self.cached_tokens
        end = start + key.shape[1]
        if self.cache_gradient != "none":
            return self._attend_out_of_place(layer, query, key, value, start, clean, ends)
        state = self._room(layer, key, start, end)
        state.keys[:, start:end] = key
        state.values[:, start:end] = value
        return None if ends else dense_attention(query, state.keys[:, :end], state.values[:, :end])

    def _attend_out_of_place(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, start: int, clean: bool, ends: bool
    ) -> Tensor | None:
        """The same where autograd may hold the cache: the layer gets new tensors and a new state."""
        old = self.layers[layer] or DenseLayer(key.new_empty(0, 0), value.new_empty(0, 0))
        pairs = ((old.keys, key), (old.values, value))
        with self.history():
            keys, values = (torch.cat([x[:, :start], new], 1) if start else new for x, new in pairs)
        out = None if ends else dense_attention(query, keys, values)
        if clean:
            with self.history():
                keys, values = (torch.cat([x[:, :start], self.merge_clean(x[:, start:], new)], 1) for x, new in pairs)
        self.layers[layer] = DenseLayer(keys, values)
        return out

    def _room(self, layer: int, key: Tensor, start: int, end: int) -> DenseLayer:
        """The layer's part of the buffers, made or grown to hold `end` tokens."""
        state = self.layers[layer]
        if state is not None and state.keys.shape[1] >= end:
            return state
        layers, old = len(self.layers), self._all
        capacity = max(end, self._known_capacity, 0 if old is None else 3 * start // 2)
        shape = (layers * key.shape[0], capacity, *key.shape[2:])
        past = None if old is None else (old.keys[:, :start], old.values[:, :start])
        return self._make_buffers(key.new_empty(0), shape, past)[layer]

    def _make_buffers(
        self, like: Tensor, shape: tuple[int, ...], past: tuple[Tensor, Tensor] | None
    ) -> list[DenseLayer]:
        """Buffers [layers * B, capacity, H, D] that begin with `past`, and the layers' parts of them."""
        self._all = made = DenseLayer(like.new_zeros(shape), like.new_zeros(shape))
        if past is not None:
            for buffer, given in zip((made.keys, made.values), past):
                buffer[:, : given.shape[1]] = given
        layers = len(self.layers)
        parts = zip(made.keys.chunk(layers), made.values.chunk(layers))
        own = [DenseLayer(keys.data, values.data) for keys, values in parts]  # to autograd tensors of their own
        self.layers = list(own)
        return own

    def _own_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"positions": list(self.positions), "floors": list(self._floors)}
        if self._all is not None:
            end = self.cached_tokens + self.chunk_frames * self.geometry.tokens_per_frame
            keys, values = (x[:, :end].contiguous() for x in (self._all.keys, self._all.values))
            state |= {"keys": keys, "values": values, "capacity": self._all.keys.shape[1]}
        return state

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        self.positions, self._floors = list(state["positions"]), list(state["floors"])
        if "keys" in state:
            keys = state["keys"]
            self._make_buffers(keys, (keys.shape[0], state["capacity"], *keys.shape[2:]), (keys, state["values"]))

    @property
    def _known_capacity(self) -> int:
        """Tokens the memory will hold, as far as that is known."""
        return (self.config.window or self.geometry.capacity_frames or 0) * self.geometry.tokens_per_frame

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cached entries, the current chunk's included; a buffer's spare room does not count."""
        end = self.cached_tokens + self.chunk_frames * self.geometry.tokens_per_frame
        return sum(x[:, :end].nbytes for state in filter(None, self.layers) for x in (state.keys, state.values))
