"""The sparse memory: a pool of blocks, a window and a persistent set that are only tables of slots.

Source: Sparse Forcing, arXiv 2604.21221, sections 3 and 4.

Legend: B batch, H heads, S slots, T tokens per block, D head dim, W window blocks, P persistent blocks, E leaving
blocks, n blocks of the current chunk. Counts are plain integers, known without looking at tensors: nothing here
synchronises with the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparse_forcing.eager_gradient import with_gradient
from sparse_forcing.errors import ConfigError
from sparse_forcing.kernels.block_selection.interface import (
    block_importance,
    block_scores,
    choose_lists,
    pool_blocks,
    update_persistent,
)
from sparse_forcing.kernels.block_sparse_attention.interface import block_sparse_attention
from sparse_forcing.memory.base import MemoryGeometry, RolloutMemory
from sparse_forcing.memory.config import MemoryConfig
from sparse_forcing.memory.slots import gather_slots, put_slots_, slot_index
from sparse_forcing.memory.sparse_training import BlockHistory, PassTables, RebuiltAttention, rebuild
from sparse_forcing.model.geometry import TileLayout
from sparse_forcing.model.rope import shift_time
from sparse_forcing.model.selector import coarse_attention, selection_loss

HISTORY_POOLS = 4
"""A history longer than this many pools is replaced by the pool itself, so that long rollouts stay bounded."""


@dataclass
class SparseLayer:
    """State of one layer. Slots differ per head, because each head keeps blocks of its own.

    keys, values: [B, H, S, T, D] pool (keys rotated); representatives: [B, H, S, D] pooled keys.
    sizes: [B, H, S] int32 tokens per slot, None while every block is full.
    position, floor, origin: [B, H, S] first frame in time, least position it may move to, number of the block since
        the start of the video.
    persistent: [B, H, P] and window: [B, H, W] slots, in the order of time.
    queries: [B, H, n, D] pooled queries of the last clean pass; mass: [B, H, S] its attention mass per slot.
    value_representatives: [B, H, S, D] pooled values and key_projection [H, D, D], for a learned selector only.
    history: what the pool was made of, where autograd is to keep that in its place (gradients that stop at the cache).
    """

    keys: Tensor
    values: Tensor
    representatives: Tensor
    sizes: Tensor | None
    position: Tensor
    floor: Tensor
    origin: Tensor
    persistent: Tensor
    window: Tensor
    queries: Tensor | None = None
    mass: Tensor | None = None
    value_representatives: Tensor | None = None
    key_projection: Tensor | None = None
    history: BlockHistory | None = None

    @property
    def nbytes(self) -> int:
        parts = (getattr(self, field.name) for field in fields(self))
        return sum(x.nbytes for x in parts if x is not None)


def _map(pooled: Tensor, projection: Tensor) -> Tensor:
    """A linear map per head: [B, H, N, D] by [H, D, D]."""
    return pooled @ projection.to(pooled.dtype)


class SparseMemory(RolloutMemory):
    """Persistent blocks and a block-sparse window.

    Args:
        selectors: per layer, an object with `query_weights`, `key_weights` [H, T] and `query_projection`,
            `key_projection` [H, D, D] (sparse_forcing.model.selector.BlockSelector); None for mean pooling.
        backend: of the attention kernel.

    Attributes:
        distilled_layers: layers whose passes with gradients append the selector's distillation loss to
            `selector_losses`; empty unless a recipe sets it.
        observer: called in every denoising pass with (layer, query blocks, the window's key blocks, their sizes, true
            attention mass); for measurements.
    """

    def __init__(
        self,
        config: MemoryConfig,
        geometry: MemoryGeometry,
        cache_gradient: str = "none",
        *,
        selectors: list | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(config, geometry, cache_gradient)
        self.selectors = selectors
        self.backend = backend
        self.distilled_layers: frozenset[int] = frozenset()
        self.selector_losses: list[Tensor] = []
        self.observer: Callable[[int, Tensor, Tensor, Tensor | None, Tensor], None] | None = None
        self.layers: list[SparseLayer | None] = [None] * geometry.num_layers
        self.chosen: dict[int, Tensor] = {}
        self.replays = False
        self.shifted = False
        self.layouts: dict[int, TileLayout] = {}
        self.layout = self._layout(geometry.chunk_frames)
        self.chunk_blocks: list[int] = []
        self.window_frames: list[int] = []
        self.num_persistent = 0
        self.blocks_seen = 0
        self._last_blocks = 0
        self._used_slots = 0
        self._own_places: Tensor | None = None  # [n] where the window holds the chunk's blocks, once a pass asked
        full_chunks = config.window_frames // geometry.chunk_frames
        if config.window_frames % geometry.chunk_frames:
            raise ConfigError(
                f"memory.window_frames: a sparse window is whole chunks of {geometry.chunk_frames} latent frames, got "
                f"{config.window_frames}; try {max(1, full_chunks) * geometry.chunk_frames}"
            )
        self.window_capacity = full_chunks * self.layout.num_blocks
        self.top_k = max(1, math.ceil(config.density * self.window_capacity))
        self.num_slots = config.persistent_blocks + self.window_capacity

    def _layout(self, frames: int) -> TileLayout:
        if frames not in self.layouts:
            self.layouts[frames] = TileLayout(frames, self.geometry.rows, self.geometry.cols, self.config.tile)
        return self.layouts[frames]

    @property
    def order(self) -> Tensor | None:
        first = self.layers[0]
        return self.layout.order if first is None else self.layout.on(first.window.device).order

    def begin_chunk(self, frames: int) -> None:
        super().begin_chunk(frames)
        self._own_places = None
        for state in filter(None, self.layers):
            self._place_chunk(state)

    def _make_room(self, frames: int) -> None:
        self.layout = self._layout(frames)
        leaving = 0
        new = self.layout.num_blocks
        # A short first chunk has as many blocks as a full one, so slots are counted as well as frames.
        while (
            sum(self.window_frames) + frames > self.config.window_frames
            or sum(self.chunk_blocks) + new > self.window_capacity
        ):
            self.window_frames.pop(0)
            leaving += self.chunk_blocks.pop(0)
        if not self.layout.uniform and any(state is not None and state.sizes is None for state in self.layers):
            raise ConfigError(
                f"memory.tile: {self.config.tile} leaves short blocks in a chunk of {frames} latent frames but not in "
                "the ones before; choose a tile that divides both or neither"
            )
        candidates = self.num_persistent + leaving
        kept = min(self.config.persistent_blocks, candidates)
        freed = candidates - kept
        for layer, state in enumerate(self.layers):
            if state is not None:
                self._update_layer(layer, state, leaving, new, freed)
        self.num_persistent = kept
        self.blocks_seen += self._last_blocks
        self._last_blocks = new
        self._used_slots += new - min(new, freed)
        self.window_frames.append(frames)
        self.chunk_blocks.append(new)

    def _update_layer(self, layer: int, state: SparseLayer, leaving: int, new: int, freed: int) -> None:
        """P_t = TopC(P_{t-1} u E_t); the new chunk takes the losers' slots, and unused ones while there are any."""
        candidates = torch.cat([state.persistent, state.window[:, :, :leaving]], 2)
        if leaving:
            kept, free = update_persistent(
                candidates, self._importance(layer, state, candidates), self.config.persistent_blocks
            )
        else:
            kept, free = candidates, candidates[:, :, :0]
        fresh = torch.arange(self._used_slots, self._used_slots + new - min(new, freed), device=candidates.device)
        fresh = fresh.expand(*candidates.shape[:2], -1)
        state.persistent = kept
        state.window = torch.cat([state.window[:, :, leaving:], free[:, :, :new], fresh], 2)

    def _own_slots(self, state: SparseLayer) -> Tensor:
        """[B, H, n] slots of the current chunk, the last ones of the window."""
        return state.window[:, :, -self.layout.num_blocks :]

    def _place_chunk(self, state: SparseLayer) -> None:
        """Say in the tables what the chunk's slots hold: once, because all passes of a chunk write the same blocks."""
        slots = self._own_slots(state)
        layout = self.layout.on(slots.device)
        first = layout.first_frame.expand(slots.shape)
        numbers = torch.arange(self.blocks_seen, self.blocks_seen + layout.num_blocks, device=slots.device)
        state.position = state.position.scatter(2, slots, first + self.chunk_position)
        state.floor = state.floor.scatter(2, slots, first)
        state.origin = state.origin.scatter(2, slots, numbers.expand(slots.shape))
        if state.sizes is not None:
            state.sizes = state.sizes.scatter(2, slots, layout.sizes.expand(slots.shape))
        if state.history is not None:
            state.history = state.history.with_current(slots, first + self.chunk_position)

    @torch.no_grad()
    def _importance(self, layer: int, state: SparseLayer, candidates: Tensor) -> Tensor:
        """[B, H, P + E] the last chunk's block attention over the candidates, summed over its queries."""
        if state.mass is not None:
            return gather_slots(state.mass, candidates)
        assert state.queries is not None, "the persistent set is updated after a clean pass"
        keys = gather_slots(state.representatives, candidates)
        if state.key_projection is not None:
            keys = _map(keys, state.key_projection)
        return block_importance(block_scores(state.queries, keys))

    def _project(self, layer: int, pooled: Tensor, side: str) -> Tensor:
        """The selector's linear map on pooled vectors [B, H, N, D]; applied late, so that stored representatives can
        be re-phased in time."""
        if self.selectors is None:
            return pooled
        return _map(pooled, getattr(self.selectors[layer], f"{side}_projection"))

    def _pool(self, layout: TileLayout, layer: int, blocks: Tensor, side: str) -> Tensor:
        """[B, H, n, D] pooled blocks [B, H, n, T, D]."""
        weights = None if self.selectors is None else getattr(self.selectors[layer], f"{side}_weights", None)
        sizes = layout.ragged_sizes(blocks.device)
        if self.selectors is None:  # without a coarse branch nothing is learned through pooled vectors
            blocks = blocks.detach()
        return pool_blocks(blocks, sizes, weights)

    def _pool_own(self, layer: int, tokens: Tensor, blocks: Tensor, side: str, *, again: bool) -> Tensor:
        """[B, H, n, D] the chunk's pooled blocks [B, H, n, T, D].

        again: cut and pool its tokens [B, L, H, D], which attention keeps anyway, once more in the backward pass, so
            that nothing keeps the blocks.
        """
        layout = self.layout  # that of a later chunk may be another
        if not again:
            return self._pool(layout, layer, blocks, side)

        def pool(tokens: Tensor) -> Tensor:
            return self._pool(layout, layer, layout.to_blocks(tokens), side)

        return checkpoint(pool, tokens, use_reentrant=False, preserve_rng_state=False)

    def _move_positions(self, frames: int) -> None:
        self.shifted = True
        for state in filter(None, self.layers):
            moved = (state.position + frames).maximum(state.floor)
            delta = moved - state.position
            if state.history is None:
                state.keys = shift_time(state.keys, delta[..., None])
            state.representatives = shift_time(state.representatives, delta)
            state.position = moved

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, clean: bool) -> Tensor:
        queries, keys, values = (self.layout.to_blocks(x) for x in (query, key, value))
        state = self._room(layer, keys)
        own_slots = self._own_slots(state)
        rebuilt = state.history is not None and torch.is_grad_enabled() and not clean
        again = rebuilt and self.selectors is not None
        pooled_keys = self._pool_own(layer, key, keys, "key", again=again)
        new = {"keys": keys, "values": values, "representatives": pooled_keys}
        if self.selectors is not None:
            new["value_representatives"] = self._pool(self.layout, layer, values, "value")
        self._write(state, own_slots, new)

        pooled = self._pool_own(layer, query, queries, "query", again=again)
        index = self._block_index(layer, state, pooled)
        if rebuilt:
            assert state.history is not None
            pools, tables = (state.keys, state.values), self._tables(state, index)
            out = RebuiltAttention.apply(query, key, value, pools, state.history, tables, self.layout)
        else:
            out = self._attend_to_pool(state, queries, index, measure=clean and self.config.importance == "mass")
        if self.selectors is not None:
            coarse = self._coarse(layer, state, pooled, again=rebuilt).expand(-1, -1, -1, self.layout.block_tokens, -1)
            out = out + self.layout.from_blocks(coarse)
            if layer in self.distilled_layers and torch.is_grad_enabled():
                self.selector_losses.append(self._selector_loss(layer, state, queries.detach()))
        if self.observer is not None and not clean:
            self.observer(layer, queries, *self._window_mass(state, queries))
        if clean:
            self._finish(layer, state, pooled, own_slots, new)
        if state.history is not None:  # each pass makes its pool of the history: one layer has one at a time
            state.keys = state.values = keys.new_empty(0)
        return out

    def _attend_to_pool(self, state: SparseLayer, queries: Tensor, index: Tensor, *, measure: bool) -> Tensor:
        """[B, L, H, D]; with `measure` the slots' attention mass is left in the state."""
        result = block_sparse_attention(
            queries,
            state.keys,
            state.values,
            index,
            query_sizes=self.layout.ragged_sizes(queries.device),
            key_sizes=state.sizes,
            num_persistent=self.num_persistent,
            return_mass=measure,
            backend=self.backend,
        )
        if result.mass is not None:
            mass = torch.zeros(state.keys.shape[:3], dtype=result.mass.dtype, device=queries.device)
            state.mass = mass.scatter_add_(2, index.flatten(2).long(), result.mass.flatten(2))
        return self.layout.from_blocks(result.out)

    def _tables(self, state: SparseLayer, index: Tensor) -> PassTables:
        assert state.history is not None
        return PassTables(
            index=index,
            key_sizes=state.sizes,
            place=state.history.place,
            moved=state.history.moved(state.position) if self.shifted else None,
            num_persistent=self.num_persistent,
            backend=self.backend,
        )

    def _finish(
        self, layer: int, state: SparseLayer, pooled_queries: Tensor, own_slots: Tensor, new: dict[str, Tensor]
    ) -> None:
        """What a clean pass leaves beside its blocks: queries to rank by, and the chunk as autograd may see it."""
        if self.selectors is not None:
            # A copy: outside a layer's pass its parameters may be sharded away.
            state.key_projection = self.selectors[layer].key_projection.detach().clone()
        if self.config.importance != "mass":
            state.queries = self._project(layer, pooled_queries, "query").detach()
        if self.cache_gradient == "straight_through":
            with self.history():
                stored = {name: gather_slots(getattr(state, name), own_slots) for name in new}
                self._write(state, own_slots, {name: self.merge_clean(stored[name], new[name]) for name in new})
        if state.history is not None:
            state.history = state.history.with_chunk(new["keys"], new["values"])
            if state.history.blocks > HISTORY_POOLS * self.num_slots:
                slots = torch.arange(self.num_slots, device=own_slots.device).expand_as(state.position)
                fresh = BlockHistory(place=slots.int(), kept_at=state.position)
                state.history = fresh.with_chunk(state.keys, state.values)

    def _coarse(self, layer: int, state: SparseLayer, pooled_queries: Tensor, *, again: bool) -> Tensor:
        """[B, H, n, 1, D] gated attention of the query blocks over the representatives of everything in memory.

        again: compute it once more in the backward pass instead of keeping what it computes with.
        """
        assert state.value_representatives is not None
        slots = torch.cat([state.persistent, state.window], 2)
        inputs = layer, pooled_queries, state.representatives, state.value_representatives, slots
        if again:
            return checkpoint(self._coarse_over, *inputs, use_reentrant=False, preserve_rng_state=False)
        return self._coarse_over(*inputs)

    def _coarse_over(self, layer: int, pooled_queries: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
        assert self.selectors is not None
        found = coarse_attention(
            self._project(layer, pooled_queries, "query"),
            self._project(layer, gather_slots(keys, slots), "key"),
            gather_slots(values, slots),
        )
        return (self.selectors[layer].gate.to(found.dtype)[:, None, None] * found).unsqueeze(3)

    def _selector_loss(self, layer: int, state: SparseLayer, queries: Tensor) -> Tensor:
        """KL between the true attention mass of the window's blocks and the selector's softmax."""
        assert self.selectors is not None
        keys, key_sizes, mass = self._window_mass(state, queries)
        query_sizes = self.layout.ragged_sizes(queries.device)

        def loss(query_weights: Tensor, query_map: Tensor, key_weights: Tensor, key_map: Tensor) -> Tensor:
            pooled_queries = _map(pool_blocks(queries, query_sizes, query_weights), query_map)
            pooled_keys = _map(pool_blocks(keys, key_sizes, key_weights), key_map)
            return selection_loss(block_scores(pooled_queries, pooled_keys), mass)

        own = self.selectors[layer]
        return with_gradient(loss, own.query_weights, own.query_projection, own.key_weights, own.key_projection)

    @torch.no_grad()
    def _window_mass(self, state: SparseLayer, queries: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The window's keys [B, H, W, T, D], their sizes, and the mass [B, H, n, W] that dense attention gives each."""
        window = state.window
        keys, values = (gather_slots(x.detach(), window) for x in (state.keys, state.values))
        sizes = None if state.sizes is None else gather_slots(state.sizes, window)
        everything = torch.arange(window.shape[2], dtype=torch.int32, device=window.device)
        mass = block_sparse_attention(
            queries, keys, values, everything.expand(*queries.shape[:3], -1), key_sizes=sizes, return_mass=True,
            query_sizes=self.layout.ragged_sizes(queries.device), backend=self.backend,
        ).mass  # fmt: skip
        assert mass is not None
        return keys, sizes, mass

    @torch.no_grad()
    def _block_index(self, layer: int, state: SparseLayer, pooled_queries: Tensor) -> Tensor:
        """[B, H, n, P + K] int32 lists: every query block sees all of P and its best window blocks, itself included.

        A pass that is run again for its gradients repeats its choice.
        """
        if self.replays and layer in self.chosen:
            return self.chosen[layer]
        num_window, n = state.window.shape[2], self.layout.num_blocks
        if self.top_k >= num_window:
            index = torch.cat([state.persistent, state.window], 2).int().unsqueeze(2).expand(-1, -1, n, -1)
        else:
            if self._own_places is None:
                self._own_places = torch.arange(num_window - n, num_window, device=pooled_queries.device)
            window = self._project(layer, gather_slots(state.representatives, state.window), "key")
            queries = self._project(layer, pooled_queries, "query")
            index = choose_lists(
                queries, window, state.persistent, state.window, top_k=self.top_k, own=self._own_places
            )
        self.chosen.setdefault(layer, index)  # not those of later passes, which have no gradients
        return index

    def snapshot(self) -> SparseMemory:
        twin = super().snapshot()
        assert isinstance(twin, SparseMemory)
        twin.replays, self.chosen = True, {}
        twin.chosen = self.chosen
        return twin

    def _write(self, state: SparseLayer, slots: Tensor, blocks: dict[str, Tensor]) -> None:
        """Put the chunk's blocks into its slots; out of place where autograd holds the pool."""
        in_place = [name for name in blocks if self._is_constant(state, name)]
        if in_place:
            put_slots_([getattr(state, name) for name in in_place], slots, [blocks[name] for name in in_place])
        with self.history():
            for name in [name for name in blocks if name not in in_place]:
                pool = getattr(state, name)
                new = blocks[name].to(pool.dtype)
                setattr(state, name, pool.scatter(2, slot_index(slots, new), new))

    def _is_constant(self, state: SparseLayer, name: str) -> bool:
        """Whether autograd does not look at this pool: it may be written in place."""
        return self.cache_gradient == "none" or (state.history is not None and name in ("keys", "values"))

    def _room(self, layer: int, keys: Tensor) -> SparseLayer:
        """The layer's state, made on its first use with the current chunk's slots at the front of the pool."""
        state = self.layers[layer]
        if state is None:
            b, h, n, t, d = keys.shape
            table = torch.zeros(b, h, self.num_slots, dtype=torch.long, device=keys.device)
            uniform = self.layout.uniform and self._layout(self.geometry.chunk_frames).uniform
            state = SparseLayer(
                keys=keys.new_zeros(b, h, self.num_slots, t, d),
                values=keys.new_zeros(b, h, self.num_slots, t, d),
                representatives=keys.new_zeros(b, h, self.num_slots, d),
                value_representatives=None if self.selectors is None else keys.new_zeros(b, h, self.num_slots, d),
                sizes=None if uniform else table.int(),
                position=table,
                floor=table,
                origin=table,
                persistent=table[:, :, :0],
                window=torch.arange(n, device=keys.device).expand(b, h, -1),
            )
            if self.cache_gradient == "detached":
                state.history = BlockHistory(place=table.int() - 1, kept_at=table)
            self._place_chunk(state)
            self.layers[layer] = state
        elif self.cache_gradient != "none":
            state = self.layers[layer] = replace(state)  # a snapshot may hold the old one
        if not state.keys.numel():
            self._rebuild_pools(state, keys)
        return state

    def _rebuild_pools(self, state: SparseLayer, keys: Tensor) -> None:
        """The pools as the history tells them, but for the current chunk's slots, which the pass is about to fill."""
        assert state.history is not None
        b, h, _, t, d = keys.shape
        if not state.history.blocks:
            state.keys, state.values = (keys.new_zeros(b, h, self.num_slots, t, d) for _ in range(2))
            return
        tables = self._tables(state, state.window)
        place = tables.place.clamp(max=state.history.blocks - 1)
        state.keys = rebuild(state.history.keys, place, tables.moved)
        state.values = rebuild(state.history.values, place)

    @property
    def cache_bytes(self) -> int:
        return sum(state.nbytes for state in filter(None, self.layers))

    def persistent_map(self) -> Tensor | None:
        """Where the persistent blocks come from: [f, rows, cols] in [0, 1], the share of layers and heads that keep a
        block of this place (of whatever chunk) for the first sample; None while there are none."""
        states = [state for state in self.layers if state is not None and state.persistent.shape[2]]
        if not states:
            return None
        n = self.layout.num_blocks
        kept = torch.zeros(n, device=states[0].keys.device)
        for state in states:
            place = gather_slots(state.origin, state.persistent)[0] % n
            kept += torch.zeros(len(place), n, device=kept.device).scatter_(1, place, 1.0).mean(0) / len(states)
        sizes = self.layout.on(kept.device).sizes
        tokens = kept.repeat_interleave(sizes)[self.layout.on(kept.device).inverse]
        return tokens.view(self.layout.frames, self.layout.rows, self.layout.cols)
