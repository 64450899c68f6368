"""Heavy hitters: a dense window and, per layer and head, the older tokens that got the most attention so far.

H2O (arXiv 2306.14048) ranks cached tokens by the attention probabilities that all queries so far gave them, summed, and
keeps the most recent tokens whatever their rank; Scissorhands (arXiv 2305.17118) also keeps recent and important tokens
but ranks by a history window. Here the sum is H2O's, taken once per chunk:

* what: the softmax probabilities of the chunk's queries over everything cached, the chunk itself included, summed over
  the queries. Older tokens have had more queries; nothing evens that out, as in H2O.
* when: in the clean pass, whose queries are those of the finished frames (the persistent blocks of the sparse memory
  are ranked in the same pass). Denoising passes count nothing.
* eviction: tokens that leave the window compete with those kept before them; the earlier of two equals stays. What is
  dropped never comes back.

The number of tokens is that of the sparse memory's persistent blocks, so that both hold the same keys and values.

Legend: B batch, H heads, D head dim, L tokens of the chunk, N tokens per frame, C heavy hitters, S cached tokens:
heavy hitters in the order of time, then the window, the current chunk last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sparse_forcing.kernels.block_selection.interface import update_persistent
from sparse_forcing.memory.base import Choices, MemoryGeometry
from sparse_forcing.memory.config import MemoryConfig
from sparse_forcing.memory.dense import DenseLayer, DenseMemory

PIECE_SCORES = 1 << 16
"""Scores per head that `attention_mass` holds at a time."""


@dataclass(frozen=True, kw_only=True)
class TokenTables:
    """What a layer knows of its tokens; modified only where no snapshot may share it (`write_into`).

    mass: [B, H, S] attention each cached token has got so far;
    position: [B, H, C] int32 frame in time at which a heavy hitter's key is rotated;
    place: [B, H, C] int32 where it was in its chunk, counted frame by frame.
    """

    mass: Tensor
    position: Tensor
    place: Tensor

    @property
    def nbytes(self) -> int:
        return self.mass.nbytes + self.position.nbytes + self.place.nbytes

    def write_into(self, old: TokenTables | None) -> TokenTables:
        """The same, in the place of those of the `old` tables that have its shapes."""
        if old is None:
            return self
        for field in fields(self):
            was, new = getattr(old, field.name), getattr(self, field.name)
            if was is not new and was.shape == new.shape:
                self = replace(self, **{field.name: was.copy_(new)})
        return self


@torch.no_grad()
def attention_mass(query: Tensor, key: Tensor) -> Tensor:
    """[B, H, S]: probabilities of dense attention of query [B, L, H, D] over key [B, S, H, D], summed over the queries.

    In float32 or better. Rows are taken a few at a time, independently of the batch.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    keys = rearrange(key, "b s h d -> b h d s").to(dtype)
    rows = max(1, PIECE_SCORES // key.shape[1])
    mass = keys.new_zeros(keys.shape[0], keys.shape[1], keys.shape[3])
    with torch.autocast(query.device.type, enabled=False):  # it would round what is ranked to 8 bits
        for part in query.transpose(1, 2).split(rows, 2):
            mass += (part.to(dtype) * query.shape[-1] ** -0.5 @ keys).softmax(-1).sum(2)
    return mass


def _extend(table: Tensor, more: Tensor) -> Tensor:
    """[B, H, C + E] of a table [B, H, C] and numbers [E] that all heads share."""
    return torch.cat([table, more.to(table).expand(*table.shape[:2], -1)], 2)


class HeavyHitterMemory(DenseMemory):
    """The current chunk sees the window and the heavy hitters of each layer and head."""

    def __init__(self, config: MemoryConfig, geometry: MemoryGeometry, cache_gradient: str = "none") -> None:
        super().__init__(config, geometry, cache_gradient)
        self.tables: list[TokenTables | None] = [None] * geometry.num_layers
        self.num_heavy = 0

    def _together(self) -> list[tuple[int, DenseLayer]]:
        """Layer by layer: each has tables of its own."""
        return [(layer, state) for layer, state in enumerate(self.layers) if state is not None]

    @property
    def cached_tokens(self) -> int:
        return self.num_heavy + super().cached_tokens

    @property
    def _known_capacity(self) -> int:
        return self.config.persistent_tokens + super()._known_capacity

    def _drop(self, first: int, last: int) -> None:
        """Of the window's first `last` frames only heavy hitters stay."""
        assert first == 0, "there is no sink"
        n, end = self.geometry.tokens_per_frame, self.cached_tokens
        candidates = self.num_heavy + last * n
        position = torch.tensor(self.positions[:last]).repeat_interleave(n)
        place = torch.tensor(self._floors[:last]).repeat_interleave(n) * n + torch.arange(n).repeat(last)
        for layer, (state, tables) in enumerate(zip(self.layers, self.tables)):
            if state is None:
                continue
            assert tables is not None, "heavy hitters are chosen after a clean pass"
            mass = tables.mass
            order = torch.arange(candidates, device=mass.device).expand(*mass.shape[:2], -1)
            kept, _ = update_persistent(order, mass[:, :, :candidates], self.config.persistent_tokens)
            rest = torch.cat([mass.gather(2, kept), mass[:, :, candidates:]], 2)
            news = TokenTables(
                mass=F.pad(rest, (0, mass.shape[2] - rest.shape[2])),  # room for the chunk, which the clean pass counts
                position=_extend(tables.position, position).gather(2, kept),
                place=_extend(tables.place, place).gather(2, kept),
            )
            self._set_tables(layer, news)
            index = kept.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, state.keys.shape[-1])
            for name in ("keys", "values"):
                x = getattr(state, name)
                past = torch.cat([x.gather(1, index), x[:, candidates:end]], 1)
                if self.cache_gradient == "none":
                    x[:, : past.shape[1]] = past
                else:
                    setattr(state, name, past)
        self.num_heavy = min(self.config.persistent_tokens, candidates)
        del self.positions[:last], self._floors[:last]

    def _shifts(self, layer: int, frames: int, delta: Tensor) -> Tensor:
        """[B, S - L, H]; a heavy hitter's floor is its frame in its chunk."""
        tables = self.tables[layer]
        assert tables is not None, "positions move after a clean pass"
        moved = (tables.position + frames).maximum(tables.place // self.geometry.tokens_per_frame)
        own = (moved - tables.position).transpose(1, 2)
        self._set_tables(layer, replace(tables, position=moved))
        return torch.cat([own, delta.to(own.dtype).expand(len(own), -1, own.shape[2])], 1)

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
        out = super().attend(layer, query, key, value, clean=clean, choices=choices, ends=ends)
        if clean:
            mass = attention_mass(query, self.cached(layer)[0])
            tables = self.tables[layer]
            if tables is None:
                nothing = torch.zeros(*mass.shape[:2], 0, dtype=torch.int32, device=mass.device)
                tables = TokenTables(mass=mass, position=nothing, place=nothing)
            else:
                mass[:, :, : self.cached_tokens] += tables.mass[:, :, : self.cached_tokens]
            self._set_tables(layer, replace(tables, mass=mass))
        return out

    def _set_tables(self, layer: int, tables: TokenTables) -> None:
        self.tables[layer] = tables.write_into(self.tables[layer]) if self.cache_gradient == "none" else tables

    def _own_state(self) -> dict[str, Any]:
        tables = [None if each is None else vars(each) for each in self.tables]
        return {**super()._own_state(), "num_heavy": self.num_heavy, "tables": tables}

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        super()._load_own_state(state)
        self.num_heavy = state["num_heavy"]
        self.tables = [None if each is None else TokenTables(**each) for each in state["tables"]]

    @property
    def cache_bytes(self) -> int:
        return super().cache_bytes + sum(tables.nbytes for tables in filter(None, self.tables))

    def persistent_map(self, chunk: int | None = None) -> Tensor | None:
        places = [tables.place[0] for tables in self.tables if tables is not None]
        if not self.num_heavy:
            return None
        shape = (self.chunk_frames, self.geometry.rows, self.geometry.cols)
        tokens = self.chunk_frames * self.geometry.tokens_per_frame
        place = torch.cat(places).long()  # [layers * H, C]
        counts = torch.ones_like(place) if chunk is None else place // tokens == chunk
        found = torch.zeros(len(place), tokens, device=place.device)
        return found.scatter_reduce_(1, place % tokens, counts.to(found), "amax").mean(0).view(shape)
