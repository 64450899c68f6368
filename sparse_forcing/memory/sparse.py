"""The sparse memory: a pool of blocks, a window and a persistent set that are only tables of slots.

Source: Sparse Forcing, arXiv 2604.21221, sections 3 and 4. What lies in the pool: `sparse_pool`; how blocks are
compressed and chosen: `sparse_selection`; which of them persist: `retention`; what training adds: `sparse_training`.

Legend: B batch, H heads, S slots, T tokens per block, D head dim, W window blocks, P persistent blocks, E leaving
blocks, n blocks of the current chunk, L tokens. Counts are plain integers, known without looking at tensors: nothing
here synchronises with the host.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.kernels.block_selection.interface import update_persistent
from sparse_forcing.kernels.block_sparse_attention.interface import block_sparse_attention
from sparse_forcing.kernels.values import trusted_values
from sparse_forcing.memory.base import Choices, MemoryGeometry, RolloutMemory, WindowObserver, WindowPass
from sparse_forcing.memory.config import MemoryConfig
from sparse_forcing.memory.retention import BlockView, RetentionRule, find_rule
from sparse_forcing.memory.slots import gather_slots, slot_index
from sparse_forcing.memory.sparse_fixed import FixedSelection
from sparse_forcing.memory.sparse_pool import Move, SlotPlan, SparseLayer
from sparse_forcing.memory.sparse_selection import BlockSelection
from sparse_forcing.memory.sparse_training import PassTables, RebuiltAttention, selector_loss, window_mass
from sparse_forcing.memory.sparse_view import map_origins, view_blocks
from sparse_forcing.model.attention import TokenOrder
from sparse_forcing.model.geometry import TileLayout
from sparse_forcing.model.selector import BlockSelector


class SparseMemory(RolloutMemory):
    """Persistent blocks and a block-sparse window.

    Args:
        selectors: the learned selector of each layer; None for mean pooling.
        backend: name of the attention kernel to compute with; "auto" chooses by device.
        rule: of retention, in place of the one that the configuration names.
    """

    def __init__(
        self,
        config: MemoryConfig,
        geometry: MemoryGeometry,
        cache_gradient: str = "none",
        *,
        selectors: list[BlockSelector] | None = None,
        backend: str = "auto",
        rule: RetentionRule | None = None,
    ) -> None:
        super().__init__(config, geometry, cache_gradient)
        self.plan = SlotPlan(config, geometry)
        top_k = max(1, math.ceil(config.density * self.plan.window_capacity))
        self.selection = BlockSelection(selectors, top_k, fixed=cache_gradient == "none")
        plain = cache_gradient == "none" and config.cache_dtype is None
        self.fixed = FixedSelection(selectors, top_k) if selectors and plain else None
        self.rule = rule or find_rule(config.retention)(config)
        if self.rule.learned and not (selectors and selectors[0].retention):
            raise ConfigError(
                f"memory.retention: {config.retention} needs a model with a trained retention head (learned_retention)"
            )
        self.backend = backend
        self.layers: list[SparseLayer | None] = [None] * geometry.num_layers
        self._all: SparseLayer | None = None  # what `layers` are parts of, where they are written in place
        self._shifted = False
        self._distilled: frozenset[int] = frozenset()
        self._observer: WindowObserver | None = None
        self._shared_out: Hashable = None

    @property
    def layout(self) -> TileLayout:
        """Tiles of the current chunk."""
        return self.plan.layout

    @property
    def num_slots(self) -> int:
        """Blocks of the pool of each layer and head."""
        return self.plan.num_slots

    def token_order(self, device: torch.device) -> TokenOrder:
        layout = self.layout.on(device)
        return TokenOrder(layout.order, layout.inverse)

    @property
    def cache_bytes(self) -> int:
        return sum(state.nbytes for state in filter(None, self.layers))

    @property
    def shapes(self) -> Hashable:
        return None if self._all is None or self._observer is not None else self._sharing(self._all)

    def _sharing(self, everything: SparseLayer) -> Hashable:
        """What the parts of `everything` depend on."""
        plan, place = self.plan, everything.keys.data_ptr()
        return plan.layout.frames, plan.num_persistent, everything.num_window, place, everything.favour is None

    def distil_selectors(self, layers: frozenset[int]) -> None:
        if self.selection.selectors is None:
            raise ConfigError("selector_weight: the model has no learned selector to distil")
        self._distilled = layers

    def observe_window(self, observer: WindowObserver) -> None:
        self._observer = observer

    def snapshot(self) -> SparseMemory:
        twin = super().snapshot()
        assert isinstance(twin, SparseMemory)
        twin.plan = copy.copy(self.plan)
        return twin

    def _own_state(self) -> dict[str, Any]:
        layers = None if self._all is None else dict(vars(self._all))
        return {"plan": self.plan.state_dict(), "shifted": self._shifted, "layers": layers}

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        self.plan.load_state_dict(state["plan"], self.chunk_frames)
        self._shifted = state["shifted"]
        if state["layers"] is not None:
            self._all = SparseLayer(**state["layers"])
            self._share_out(self._all)

    def begin_chunk(self, frames: int) -> None:
        super().begin_chunk(frames)
        for _, state in self._together():
            state.place_chunk(self.plan, self.chunk_position, self.rule.fresh)
        if self._all is not None:
            self._share_out(self._all)

    def _rewind(self, chunks: Sequence[int]) -> int:
        count, blocks = self.plan.rewind(len(chunks))
        for _, state in self._together():
            state.num_window -= blocks
        return count

    def begin_again(self, frames: int) -> None:
        assert self._all is not None, "what was taken out was written in place"
        self._all.num_window += self.plan.begin_again(frames)
        super().begin_again(frames)
        self._share_out(self._all)

    def _make_room(self, frames: int) -> None:
        finished, move = self.plan.chunk, self.plan.begin(frames)
        if not self.layout.uniform and any(state.sizes is None for _, state in self._together()):
            raise ConfigError(
                f"memory.tile: {self.config.tile} leaves short blocks in a chunk of {frames} latent frames but not in "
                "the ones before; choose a tile that divides both or neither"
            )
        for layer, state in self._together():
            self._update(layer, state, move, finished)

    def _together(self) -> list[tuple[int, SparseLayer]]:
        """(number, state) of the layers there are; in place all are one, with number -1."""
        if self._all is not None:
            return [(-1, self._all)]
        return [(layer, state) for layer, state in enumerate(self.layers) if state is not None]

    def _share_out(self, everything: SparseLayer) -> None:
        """Make `layers` the parts of `everything` again, after a chunk has begun."""
        layers = len(self.layers)
        everything.number_rows(self.layout, layers)
        if self.fixed is not None and everything.keys.device.type == "cpu":
            self.fixed.begin(everything, self.layout)
        if everything.queries is not None and everything.queries.shape[2] != self.layout.num_blocks:
            b, h, _, d = everything.queries.shape
            everything.queries = everything.queries.new_zeros(b, h, self.layout.num_blocks, d)
        sharing = self._sharing(everything)
        if sharing != self._shared_out:
            self.layers = [everything.layer(number, layers) for number in range(layers)]
            self._shared_out = sharing

    @torch.no_grad()
    def _update(self, layer: int, state: SparseLayer, move: Move, chunk: int) -> None:
        """P_t = TopC(P_{t-1} u E_t) by the rule's scores; the new chunk takes the losers' slots, and unused ones while
        there are any."""
        if self.rule.state_size:
            slots = state.slots
            news = self._ask(self.rule.observe, layer, state, slots, chunk)
            state.scatter("retained", slot_index(slots, news), news)
        candidates = torch.cat([state.persistent, state.window[:, :, : move.leaving]], 2)
        if 0 < move.kept < candidates.shape[2]:
            scores = self._ask(partial(self.rule.scores, capacity=move.kept), layer, state, candidates, chunk)
        else:  # all stay, or none
            scores = torch.zeros(candidates.shape, device=candidates.device)
        kept, freed = update_persistent(candidates, scores, self.config.persistent_blocks)
        state.take_slots(move, kept, freed)

    def _ask(
        self, question: Callable[[BlockView], Tensor], layer: int, state: SparseLayer, slots: Tensor, chunk: int
    ) -> Tensor:
        """The rule's answer about the blocks in `slots` [B, H, N], layer by layer unless it takes all at once."""
        if state is not self._all or self.rule.layers_at_once:
            return question(view_blocks(self.plan, layer, state, slots, chunk))
        layers = len(self.layers)
        parts = zip(range(layers), slots.chunk(layers))
        return torch.cat(
            [question(view_blocks(self.plan, i, state.layer(i, layers), part, chunk)) for i, part in parts]
        )

    def _move_positions(self, frames: int) -> None:
        self._shifted = True
        for _, state in self._together():
            state.move_positions(frames)

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
        ends = ends and not self.rule.measures_mass(clean)
        if self.fixed is not None and self._observer is None and self.fixed.serves(self._all, query):
            return self._attend_in_few_calls(self.fixed, layer, query, key, value, clean, ends)
        with nullcontext() if torch.compiler.is_compiling() else trusted_values():  # compiled, no values are checked
            found = self._attend(layer, query, key, value, clean, choices, ends)
        state = self.layers[layer]
        if state is not None and state.history is not None:  # a pool is made for each pass, of one layer at a time
            state.keys = state.values = key.new_empty(0)
        return found

    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, clean: bool, choices: Choices | None, ends: bool
    ) -> Tensor | None:
        layout, selection = self.layout, self.selection
        queries, keys, values = (layout.to_blocks(x) for x in (query, key, value))
        state = self._room(layer, keys)
        trains = torch.is_grad_enabled()
        rebuilt = state.history is not None and trains and not clean
        again = rebuilt and selection.selectors is not None
        new: dict[str, Tensor] = {"keys": keys, "values": values}
        if state.own_rows is not None and not again:
            selection.store(layout, layer, state, keys, values)
        else:
            new["representatives"] = selection.pool_chunk(layout, layer, key, keys, "key", again=again)
            if selection.selectors is not None:
                new["value_representatives"] = selection.pool(layout, layer, values, "value")
            self._write(state, new)

        pooled = selection.pool_chunk(layout, layer, query, queries, "query", again=again)
        if ends:
            self._finish(layer, state, selection.project(layer, pooled, "query").detach(), new)
            return None
        coarse, compared = selection.compare(layer, state, pooled, again=rebuilt)
        choices = {} if choices is None else choices
        if layer not in choices:
            choices[layer] = selection.lists(state, compared)
        index = choices[layer]
        if rebuilt:
            pools, tables = (state.keys, state.values), self._tables(state, index)
            out = RebuiltAttention.apply(query, key, value, pools, state.history, tables, layout)
        else:
            out = self._attend_to_pool(state, queries, index, measure=self.rule.measures_mass(clean))
        if coarse is not None:
            out = layout.add_to_tokens(out, coarse)
        self._measure(layer, state, queries.detach(), clean)
        if clean:
            self._finish(layer, state, compared.queries, new)
        return out

    def _attend_in_few_calls(
        self, fixed: FixedSelection, layer: int, query: Tensor, key: Tensor, value: Tensor, clean: bool, ends: bool
    ) -> Tensor | None:
        state = self.layers[layer]
        assert state is not None
        own = fixed.layer(layer, state, query, key, value)
        pooled, measure = own.pool(), self.rule.measures_mass(clean)
        if clean:
            own.keep()
            self._finish(layer, state, self.selection.project(layer, pooled, "query"), {})
        if ends:
            return None
        scores = own.scores(pooled)
        index, coarse = own.lists(scores, fixed.top_k), own.coarse(scores)
        found = None if measure else own.attend(index, coarse)
        if found is not None:
            return found
        own.keep()
        queries = self.layout.to_blocks(query)
        with trusted_values():
            return self.layout.add_to_tokens(self._attend_to_pool(state, queries, index, measure=measure), coarse)

    def _attend_to_pool(self, state: SparseLayer, queries: Tensor, index: Tensor, *, measure: bool) -> Tensor:
        """[B, L, H, D]; with `measure` the slots' attention mass is left in the state."""
        result = block_sparse_attention(
            queries,
            state.keys,
            state.values,
            index,
            query_sizes=self.layout.ragged_sizes(queries.device),
            key_sizes=state.sizes,
            num_persistent=self.plan.num_persistent,
            return_mass=measure,
            backend=self.backend,
        )
        if result.mass is not None:
            mass = torch.zeros(state.keys.shape[:3], dtype=result.mass.dtype, device=queries.device)
            state.store("mass", mass.scatter_add_(2, index.flatten(2).long(), result.mass.flatten(2)))
        return self.layout.from_blocks(result.out)

    def _measure(self, layer: int, state: SparseLayer, queries: Tensor, clean: bool) -> None:
        """The selector's loss and what an observer sees, where they are asked for."""
        distils = layer in self._distilled and torch.is_grad_enabled()
        observes = self._observer is not None and not clean
        if not (distils or observes):
            return
        window, query_sizes = state.window, self.layout.ragged_sizes(queries.device)
        keys, values = (gather_slots(x.detach(), window) for x in (state.keys, state.values))
        key_sizes = None if state.sizes is None else gather_slots(state.sizes, window)
        mass = window_mass(queries, keys, values, query_sizes, key_sizes, self.backend)
        if distils:
            assert self.selection.selectors is not None
            selector = self.selection.selectors[layer]
            self.selector_losses.append(selector_loss(selector, queries, keys, query_sizes, key_sizes, mass))
        if observes:
            assert self._observer is not None
            full = window.shape[2] == self.plan.window_capacity
            self._observer(
                WindowPass(layer=layer, queries=queries, keys=keys, key_sizes=key_sizes, mass=mass, full=full)
            )

    def _tables(self, state: SparseLayer, index: Tensor) -> PassTables:
        assert state.history is not None
        return PassTables(
            index=index,
            key_sizes=state.sizes,
            place=state.history.place,
            moved=state.history.count_moved_frames(state.position) if self._shifted else None,
            num_persistent=self.plan.num_persistent,
            backend=self.backend,
        )

    def _finish(self, layer: int, state: SparseLayer, queries: Tensor, new: dict[str, Tensor]) -> None:
        """What a clean pass leaves beside its blocks: mapped queries to rank by, the chunk as autograd may see it."""
        self.selection.copy_weights(layer, state, retention=self.rule.learned)
        if "attention" in self.rule.reads:
            state.store("queries", queries)
        if self.cache_gradient == "straight_through":
            own = state.own_slots(self.layout)
            with self.history():
                stored = {name: gather_slots(getattr(state, name), own) for name in new}
                merged = {name: self.merge_clean(stored[name], new[name]) for name in new}
            self._write(state, merged)
        if state.history is not None:
            history = state.history.with_chunk(new["keys"], new["values"])
            state.history = history.bound((state.keys, state.values), state.position)

    def _write(self, state: SparseLayer, blocks: dict[str, Tensor]) -> None:
        """Put the chunk's blocks into its slots; out of place where autograd holds the pool."""
        in_place = () if state.history is None else ("keys", "values")
        with self.history():
            state.write(state.own_slots(self.layout), blocks, in_place=in_place)

    def _room(self, layer: int, keys: Tensor) -> SparseLayer:
        """The layer's state, made on its first use."""
        state = self.layers[layer]
        if state is None:
            in_place = self.cache_gradient == "none"
            state = SparseLayer.empty(
                self.plan,
                keys,
                self.rule,
                layers=len(self.layers) if in_place else None,
                selector=self.selection.selectors is not None,
                history=self.cache_gradient == "detached",
            )
            state.place_chunk(self.plan, self.chunk_position, self.rule.fresh)
            if in_place:
                self._all = state
                self._share_out(state)
                state = self.layers[layer]
                assert state is not None
            else:
                self.layers[layer] = state
        elif self.cache_gradient != "none":
            state = self.layers[layer] = replace(state)  # a snapshot may hold the old one
        if state.history is not None and not state.keys.numel():
            state.keys, state.values = state.history.pools(keys, state.position if self._shifted else None)
        return state

    def persistent_map(self, chunk: int | None = None) -> Tensor | None:
        states = [state for state in filter(None, self.layers) if state.persistent.shape[2]]
        return map_origins(states, self.layout, chunk) if states else None
