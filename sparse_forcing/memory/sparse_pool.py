"""The pool of the sparse memory: which slots a chunk gets, and what a layer holds in them.

Legend: B batch, H heads, S slots, T tokens per block, D head dim, W window blocks, P persistent blocks, n blocks of the
current chunk. Slots differ per head, because each head keeps blocks of its own; how many are used for what does not.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory.base import MemoryGeometry
from sparse_forcing.memory.config import MemoryConfig
from sparse_forcing.memory.retention import RetentionRule
from sparse_forcing.memory.slots import gather_slots, put_slots_, slot_index, widen_blocks
from sparse_forcing.memory.sparse_training import BlockHistory
from sparse_forcing.model.geometry import TileLayout
from sparse_forcing.model.rope import shift_time, shift_time_
from sparse_forcing.model.selector import HIDDEN

OWN = 1e30
"""Added to the score of a query block's own block: more than any score, less than what persistent blocks get."""
_PLANNED = ("window", "num_persistent", "first_block", "chunk", "_used_slots")


class Move(NamedTuple):
    """What happens to the blocks of every layer when a chunk begins: `leaving` of the window become candidates, of
    which `kept` persist; the chunk takes `reused` slots of the others, and `fresh` unused ones from `first_fresh`."""

    leaving: int
    kept: int
    reused: int
    first_fresh: int
    fresh: int


class SlotPlan:
    """How many blocks lie where, in plain integers that are known without looking at a tensor.

    Attributes (values that are replaced, never changed, so that a shallow copy goes its own way):
        layout: tiles of the current chunk; window: (latent frames, blocks) of each chunk in the window, oldest first.
        num_persistent: blocks of the persistent set; first_block: number, since the start of the video, of the current
            chunk's first block; chunk: number of the current chunk, -1 before the first.
    """

    def __init__(self, config: MemoryConfig, geometry: MemoryGeometry) -> None:
        full_chunks = config.window_frames // geometry.chunk_frames
        if config.window_frames % geometry.chunk_frames:
            raise ConfigError(
                f"memory.window_frames: a sparse window is whole chunks of {geometry.chunk_frames} latent frames, got "
                f"{config.window_frames}; try {max(1, full_chunks) * geometry.chunk_frames}"
            )
        self.config, self.geometry = config, geometry
        self._layouts: dict[int, TileLayout] = {}
        self.layout = self._find_layout(geometry.chunk_frames)
        self.window_capacity = full_chunks * self.layout.num_blocks
        self.num_slots = config.persistent_blocks + self.window_capacity
        self.window: tuple[tuple[int, int], ...] = ()
        self.num_persistent = 0
        self.first_block = 0
        self.chunk = -1
        self._used_slots = 0

    def _find_layout(self, frames: int) -> TileLayout:
        if frames not in self._layouts:
            self._layouts[frames] = TileLayout(frames, self.geometry.rows, self.geometry.cols, self.config.tile)
        return self._layouts[frames]

    def rewind(self, most: int) -> tuple[int, int]:
        """Take at most so many of the last chunks out of the window; returns how many they are, and their blocks. Their
        slots stay in the tables behind it, where `begin_again` finds them."""
        count = min(most, len(self.window))
        taken, self.window = self.window[len(self.window) - count :], self.window[: len(self.window) - count]
        return count, sum(blocks for _, blocks in taken)

    def begin_again(self, frames: int) -> int:
        """Put the next of those chunks back; returns its blocks."""
        self.layout = self._find_layout(frames)
        self.window = (*self.window, (frames, self.layout.num_blocks))
        return self.layout.num_blocks

    def state_dict(self) -> dict[str, Any]:
        """What another plan of the same configuration and geometry goes on from."""
        return {name: getattr(self, name) for name in _PLANNED}

    def load_state_dict(self, state: Mapping[str, Any], chunk_frames: int) -> None:
        """Go on from the state of another plan, whose current chunk has so many latent frames."""
        for name in _PLANNED:
            setattr(self, name, state[name])
        self.layout = self._find_layout(chunk_frames or self.geometry.chunk_frames)

    @property
    def uniform(self) -> bool:
        """Whether the blocks of this chunk and of a usual one are all full."""
        return self.layout.uniform and self._find_layout(self.geometry.chunk_frames).uniform

    @property
    def frame_blocks(self) -> int:
        """Blocks that lie beside each other in time."""
        return self._find_layout(1).num_blocks

    def begin(self, frames: int) -> Move:
        """Plan for a chunk of `frames` latent frames: room in the window, and slots."""
        old, window = self.layout, self.window
        self.layout = self._find_layout(frames)
        new, leaving = self.layout.num_blocks, 0
        # A short first chunk has as many blocks as a full one, so slots are counted as well as frames.
        while window and (
            sum(f for f, _ in window) + frames > self.config.window_frames
            or sum(n for _, n in window) + new > self.window_capacity
        ):
            leaving += window[0][1]
            window = window[1:]
        candidates = self.num_persistent + leaving
        kept = min(self.config.persistent_blocks, candidates)
        reused = min(new, candidates - kept)
        move = Move(leaving, kept, reused, self._used_slots, new - reused)
        self.first_block += old.num_blocks if self.window else 0
        self.window = (*window, (frames, new))
        self.num_persistent = kept
        self._used_slots += move.fresh
        self.chunk += 1
        return move


@dataclass
class SparseLayer:
    """State of one layer, or of all layers at once, whose samples then follow one another: B is layers * samples.

    in_place: its tensors keep their places in memory for as long as their shapes stay (inference); otherwise, where
        autograd or a snapshot may hold them, every change makes new ones.
    keys, values: [B, H, S, T, D] pool (keys rotated); representatives: [B, H, S, D] pooled keys.
    sizes: [B, H, S] int32 tokens per slot, None while every block is full.
    position, floor, origin: [B, H, S] first frame in time, least position it may move to, number of the block since
        the start of the video.
    table: [B, H, S] slots in the order of time: the persistent ones end where a full persistent set would, at
        `capacity`, and those of the window follow.
    retained: [B, H, S, R] float32 that the rule of retention remembers of each slot's block; often R is 0.
    queries: [B, H, n, D] pooled queries of the last clean pass; mass: [B, H, S] its attention mass per slot.
    value_representatives: [B, H, S, D] pooled values and key_projection [H, D, D], for a learned selector only;
        retention_head: weights of its retention head, for a learned rule only. Of all layers these two have one
        dimension more, [layers, ...].
    own_rows: [B, H, n] rows of one layer's flattened pools that hold the current chunk's blocks; None where pools are
        written out of place.
    favour: [B, H, n, S] what is added to the score of a slot before those of a query block are ranked, for
        sparse_fixed; None while there are unused slots, which have no score. rows: [B, H, S] where its tables hold what
        is in a slot.
    packed_keys, packed_values: [B, H, S, T, D] int8, and packed_scales [B, H, S, 2, D] of both, of blocks that are
        kept in 8 bits; packed_at: [B, H, S] position that keys had when they were rounded. Then keys and values are one
        layer's pool, which all share: what a pass over a layer reads.
    history: what the pool was made of, where autograd is to keep that in its place (gradients that stop at the cache).
    """

    in_place: bool
    capacity: int
    num_persistent: int
    num_window: int
    keys: Tensor
    values: Tensor
    representatives: Tensor
    sizes: Tensor | None
    position: Tensor
    floor: Tensor
    origin: Tensor
    table: Tensor
    retained: Tensor
    queries: Tensor | None = None
    mass: Tensor | None = None
    value_representatives: Tensor | None = None
    key_projection: Tensor | None = None
    retention_head: Tensor | None = None
    own_rows: Tensor | None = None
    favour: Tensor | None = None
    rows: Tensor | None = None
    packed_keys: Tensor | None = None
    packed_values: Tensor | None = None
    packed_scales: Tensor | None = None
    packed_at: Tensor | None = None
    history: BlockHistory | None = None

    @classmethod
    def empty(
        cls, plan: SlotPlan, keys: Tensor, rule: RetentionRule, *, layers: int | None, selector: bool, history: bool
    ) -> SparseLayer:
        """The state for a first chunk whose blocks look like `keys` [B, H, n, T, D]; its slots lead the pool.

        Args:
            layers: all of them at once, in place; None: of one layer, out of place.
        """
        b, h, n, t, d = keys.shape
        b *= layers or 1

        def numbers() -> Tensor:
            return torch.zeros(b, h, plan.num_slots, dtype=torch.long, device=keys.device)

        capacity = plan.config.persistent_blocks
        table = numbers()
        table[:, :, capacity : capacity + n] = torch.arange(n, device=keys.device)
        state = cls(
            in_place=layers is not None,
            capacity=capacity,
            num_persistent=0,
            num_window=n,
            keys=keys.new_zeros(b, h, plan.num_slots, t, d),
            values=keys.new_zeros(b, h, plan.num_slots, t, d),
            representatives=keys.new_zeros(b, h, plan.num_slots, d),
            value_representatives=keys.new_zeros(b, h, plan.num_slots, d) if selector else None,
            sizes=None if plan.uniform else numbers().int(),
            position=numbers(),
            floor=numbers(),
            origin=numbers(),
            table=table,
            retained=torch.full((*table.shape, rule.state_size), rule.fresh, device=keys.device),
            history=BlockHistory(place=torch.full_like(table, -1), kept_at=numbers()) if history else None,
        )
        if plan.config.cache_dtype is not None:
            assert layers is not None, "blocks in 8 bits are written in place"
            pool = b // layers, h, plan.num_slots, t, d
            state.packed_keys, state.packed_values = (keys.new_zeros(b, *pool[1:], dtype=torch.int8) for _ in range(2))
            state.packed_scales = keys.new_zeros(b, h, plan.num_slots, 2, d, dtype=torch.bfloat16)
            state.packed_at = numbers()
            state.keys, state.values = keys.new_zeros(pool), keys.new_zeros(pool)
        if layers is not None:
            state.own_rows = table.new_zeros(b, h, n)
            state.queries = keys.new_zeros(b, h, n, d) if "attention" in rule.reads else None
            weights = torch.promote_types(keys.dtype, torch.float32)
            state.mass = keys.new_zeros(table.shape, dtype=weights) if "mass" in rule.reads else None
            state.key_projection = keys.new_zeros(layers, h, d, d) if selector else None
            if rule.learned:
                state.retention_head = keys.new_zeros(layers, h, 2 * d + 3, HIDDEN)
        return state

    def layer(self, number: int, layers: int) -> SparseLayer:
        """One of the `layers` that this is the state of: its tensors are parts of this one's, to autograd tensors of
        their own: a pass with gradients may hold one layer's while another's is written."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor) and name not in self._shared}
        part: dict[str, Any] = {name: x.chunk(layers)[number].data for name, x in tensors.items()}
        for name in ("key_projection", "retention_head"):
            if name in part:
                part[name] = getattr(self, name)[number].data
        return replace(self, **part)

    @property
    def _shared(self) -> tuple[str, ...]:
        """What is not this layer's alone."""
        return () if self.packed_keys is None else ("keys", "values")

    @property
    def nbytes(self) -> int:
        own = (x for name, x in vars(self).items() if name not in self._shared)
        return sum(x.nbytes for x in own if isinstance(x, Tensor | BlockHistory))

    @property
    def persistent(self) -> Tensor:
        """[B, H, P] slots of the persistent set, in the order of time."""
        return self.table[:, :, self.capacity - self.num_persistent : self.capacity]

    @property
    def window(self) -> Tensor:
        """[B, H, W] slots of the window, in the order of time."""
        return self.table[:, :, self.capacity : self.capacity + self.num_window]

    @property
    def slots(self) -> Tensor:
        """[B, H, P + W] slots in use, in the order of time."""
        return self.table[:, :, self.capacity - self.num_persistent : self.capacity + self.num_window]

    def own_slots(self, layout: TileLayout) -> Tensor:
        """[B, H, n] slots of the current chunk, the last ones of the window."""
        return self.window[:, :, -layout.num_blocks :]

    def store(self, name: str, new: Tensor) -> None:
        """`new` as the tensor of that name, in the place of the old one where that is kept."""
        old = getattr(self, name)
        if self.in_place and old is not None and old.shape == new.shape:
            old.copy_(new)
        else:
            setattr(self, name, new)

    def scatter(self, name: str, index: Tensor, new: Tensor | float) -> None:
        """Write `new` at `index` of the tensor's slots."""
        old = getattr(self, name)
        if self.in_place:
            old.scatter_(2, index, new)
        else:
            setattr(self, name, old.scatter(2, index, new))

    def take_slots(self, move: Move, kept: Tensor, freed: Tensor) -> None:
        """Slots `kept` [B, H, P] are the persistent set; the chunk takes some that are `freed`, then unused ones."""
        unused = torch.arange(move.first_fresh, move.first_fresh + move.fresh, device=kept.device)
        unused = unused.expand(*kept.shape[:2], -1)
        slots = torch.cat([kept, self.window[:, :, move.leaving :], freed[:, :, : move.reused], unused], 2)
        self.num_persistent = kept.shape[2]
        self.num_window = slots.shape[2] - self.num_persistent
        if not self.in_place:
            self.table = self.table.clone()
        self.slots.copy_(slots)

    def place_chunk(self, plan: SlotPlan, position: int, fresh: float) -> None:
        """Say in the tables what the chunk's slots hold: once, because all passes of a chunk write the same blocks.

        Args:
            position: of its first frame in time; fresh: the rule's state of a new block.
        """
        slots = self.own_slots(plan.layout)
        layout = plan.layout.on(slots.device)
        first = layout.first_frame.expand(slots.shape)
        numbers = torch.arange(plan.first_block, plan.first_block + layout.num_blocks, device=slots.device)
        self.scatter("position", slots, first + position)
        self.scatter("floor", slots, first)
        self.scatter("origin", slots, numbers.expand(slots.shape))
        if self.sizes is not None:
            self.scatter("sizes", slots, layout.sizes.expand(slots.shape))
        if self.retained.shape[3]:
            self.scatter("retained", slot_index(slots, self.retained), fresh)
        if self.history is not None:
            self.history = self.history.with_current(slots, first + position)
            self.number_rows(plan.layout, 1)

    def number_rows(self, layout: TileLayout, layers: int) -> None:
        """Say where in the flattened pools of its layer the chunk's blocks lie."""
        slots = self.own_slots(layout)
        first = torch.arange(0, self.table.numel() // layers, self.table.shape[2], device=slots.device)
        rows = first.view(1, -1, 1) + slots.reshape(layers, -1, slots.shape[2])
        self.store("own_rows", rows.view(slots.shape))

    def copy_representatives(self) -> None:
        """Go on with copies, which nobody else holds."""
        for name in ("representatives", "value_representatives"):
            held = getattr(self, name)
            setattr(self, name, None if held is None else held.detach().clone())

    def favour_slots(self, layout: TileLayout) -> None:
        """Say what every query block of the chunk lists whatever its scores: the persistent blocks, then its own. Not
        while a slot is unused or a block may be short: then not all slots of a list can be read to their ends."""
        if self.sizes is not None or self.slots.shape[2] < self.table.shape[2]:
            self.favour = None
            return
        n = layout.num_blocks
        favour = self.keys.new_zeros(*self.table.shape[:2], n, self.table.shape[2])
        favour.scatter_(3, self.own_slots(layout).unsqueeze(3), OWN)
        favour.scatter_(3, self.persistent.unsqueeze(2).expand(-1, -1, n, -1), torch.inf)
        self.store("favour", favour)

    def move_positions(self, frames: int) -> None:
        """Move every key in time by `frames`, none below its floor. A history moves its keys when it is read."""
        moved = (self.position + frames).maximum(self.floor)
        delta = moved - self.position
        if self.in_place:
            if self.packed_keys is None:
                shift_time_(self.keys, delta[..., None])
            shift_time_(self.representatives, delta)
        else:
            if self.history is None:
                self.keys = shift_time(self.keys, delta[..., None])
            self.representatives = shift_time(self.representatives, delta)
        self.store("position", moved)

    def write(self, slots: Tensor, blocks: dict[str, Tensor], *, in_place: Container[str]) -> None:
        """Put `blocks` [B, H, n, ...], by the name of their pool, into its slots [B, H, n]: those named in `in_place`
        where they are, the others into a copy, because autograd holds the pool."""
        here = [name for name in blocks if name in in_place]
        if here:
            put_slots_([getattr(self, name) for name in here], slots, [blocks[name] for name in here], self.own_rows)
        for name in [name for name in blocks if name not in in_place]:
            pool = getattr(self, name)
            new = blocks[name].to(pool.dtype)
            setattr(self, name, pool.scatter(2, slot_index(slots, new), new))

    def read(self, name: str, slots: Tensor) -> Tensor:
        """[B, H, N, T, D] "keys" or "values" of `slots` [B, H, N], as they lie in the pool or would lie there."""
        pool = getattr(self, name)
        if self.packed_keys is not None:
            return self._read_packed(name, slots)
        if self.history is None or pool.numel():
            return gather_slots(pool, slots)
        return self.history.blocks_in(name, slots, self.position)

    @property
    def packed(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of blocks in 8 bits: codes of keys and of values, scales, and where in time keys were."""
        packed = self.packed_keys, self.packed_values, self.packed_scales, self.packed_at
        assert all(x is not None for x in packed)
        return packed  # type: ignore[return-value]

    def _read_packed(self, name: str, slots: Tensor) -> Tensor:
        keys, values, scales, at = self.packed
        number, codes = (0, keys) if name == "keys" else (1, values)
        own = gather_slots(codes, slots), gather_slots(scales[:, :, :, number], slots)
        blocks = widen_blocks(*own, self.keys.dtype)
        if name == "keys":
            shift_time_(blocks, gather_slots(self.position - at, slots)[..., None])
        return blocks
