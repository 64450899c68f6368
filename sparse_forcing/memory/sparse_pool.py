"""The pool of the sparse memory: which slots a chunk gets, and what a layer holds in them.

Legend: B batch, H heads, S slots, T tokens per block, D head dim, W window blocks, P persistent blocks, n blocks of the
current chunk. Slots differ per head, because each head keeps blocks of its own; how many are used for what does not.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory.base import MemoryGeometry
from sparse_forcing.memory.config import MemoryConfig
from sparse_forcing.memory.retention import RetentionRule
from sparse_forcing.memory.slots import gather_slots, put_slots_, slot_index
from sparse_forcing.memory.sparse_training import BlockHistory
from sparse_forcing.model.geometry import TileLayout
from sparse_forcing.model.rope import shift_time


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
        self.layout = self._layout_of(geometry.chunk_frames)
        self.window_capacity = full_chunks * self.layout.num_blocks
        self.num_slots = config.persistent_blocks + self.window_capacity
        self.window: tuple[tuple[int, int], ...] = ()
        self.num_persistent = 0
        self.first_block = 0
        self.chunk = -1
        self._used_slots = 0

    def _layout_of(self, frames: int) -> TileLayout:
        if frames not in self._layouts:
            self._layouts[frames] = TileLayout(frames, self.geometry.rows, self.geometry.cols, self.config.tile)
        return self._layouts[frames]

    @property
    def uniform(self) -> bool:
        """Whether the blocks of this chunk and of a usual one are all full."""
        return self.layout.uniform and self._layout_of(self.geometry.chunk_frames).uniform

    @property
    def frame_blocks(self) -> int:
        """Blocks that lie beside each other in time."""
        return self._layout_of(1).num_blocks

    def begin(self, frames: int) -> Move:
        """Plan for a chunk of `frames` latent frames: room in the window, and slots."""
        old, window = self.layout, self.window
        self.layout = self._layout_of(frames)
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
    """State of one layer.

    keys, values: [B, H, S, T, D] pool (keys rotated); representatives: [B, H, S, D] pooled keys.
    sizes: [B, H, S] int32 tokens per slot, None while every block is full.
    position, floor, origin: [B, H, S] first frame in time, least position it may move to, number of the block since
        the start of the video.
    persistent: [B, H, P] and window: [B, H, W] slots, in the order of time.
    queries: [B, H, n, D] pooled queries of the last clean pass; mass: [B, H, S] its attention mass per slot.
    retained: [B, H, S, R] float32 that the rule of retention remembers of each slot's block; often R is 0.
    value_representatives: [B, H, S, D] pooled values and key_projection [H, D, D], for a learned selector only;
        retention_head: weights of its retention head, for a learned rule only.
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
    retained: Tensor
    queries: Tensor | None = None
    mass: Tensor | None = None
    value_representatives: Tensor | None = None
    key_projection: Tensor | None = None
    retention_head: Tensor | None = None
    history: BlockHistory | None = None

    @classmethod
    def empty(cls, plan: SlotPlan, keys: Tensor, rule: RetentionRule, *, selector: bool, history: bool) -> SparseLayer:
        """The state for a first chunk whose blocks look like `keys` [B, H, n, T, D]; its slots lead the pool."""
        b, h, n, t, d = keys.shape
        table = torch.zeros(b, h, plan.num_slots, dtype=torch.long, device=keys.device)
        return cls(
            keys=keys.new_zeros(b, h, plan.num_slots, t, d),
            values=keys.new_zeros(b, h, plan.num_slots, t, d),
            representatives=keys.new_zeros(b, h, plan.num_slots, d),
            value_representatives=keys.new_zeros(b, h, plan.num_slots, d) if selector else None,
            sizes=None if plan.uniform else table.int(),
            position=table,
            floor=table,
            origin=table,
            persistent=table[:, :, :0],
            window=torch.arange(n, device=keys.device).expand(b, h, -1),
            retained=torch.full((*table.shape, rule.state_size), rule.fresh, device=keys.device),
            history=BlockHistory(place=table.int() - 1, kept_at=table) if history else None,
        )

    @property
    def nbytes(self) -> int:
        parts = (getattr(self, field.name) for field in fields(self))
        return sum(x.nbytes for x in parts if x is not None)

    @property
    def slots(self) -> Tensor:
        """[B, H, P + W] slots in use, in the order of time."""
        return torch.cat([self.persistent, self.window], 2)

    def own_slots(self, layout: TileLayout) -> Tensor:
        """[B, H, n] slots of the current chunk, the last ones of the window."""
        return self.window[:, :, -layout.num_blocks :]

    def take_slots(self, move: Move, kept: Tensor, freed: Tensor) -> None:
        """Slots `kept` [B, H, P] are the persistent set; the chunk takes some that are `freed`, then unused ones."""
        unused = torch.arange(move.first_fresh, move.first_fresh + move.fresh, device=kept.device)
        unused = unused.expand(*kept.shape[:2], -1)
        self.persistent = kept
        self.window = torch.cat([self.window[:, :, move.leaving :], freed[:, :, : move.reused], unused], 2)

    def place_chunk(self, plan: SlotPlan, position: int, fresh: float) -> None:
        """Say in the tables what the chunk's slots hold: once, because all passes of a chunk write the same blocks.

        Args:
            position: of its first frame in time; fresh: the rule's state of a new block.
        """
        slots = self.own_slots(plan.layout)
        layout = plan.layout.on(slots.device)
        first = layout.first_frame.expand(slots.shape)
        numbers = torch.arange(plan.first_block, plan.first_block + layout.num_blocks, device=slots.device)
        self.position = self.position.scatter(2, slots, first + position)
        self.floor = self.floor.scatter(2, slots, first)
        self.origin = self.origin.scatter(2, slots, numbers.expand(slots.shape))
        if self.sizes is not None:
            self.sizes = self.sizes.scatter(2, slots, layout.sizes.expand(slots.shape))
        self.retained = self.retained.scatter(2, slot_index(slots, self.retained), fresh)
        if self.history is not None:
            self.history = self.history.with_current(slots, first + position)

    def move_positions(self, frames: int) -> None:
        """Move every key in time by `frames`, none below its floor. A history moves its keys when it is read."""
        moved = (self.position + frames).maximum(self.floor)
        delta = moved - self.position
        if self.history is None:
            self.keys = shift_time(self.keys, delta[..., None])
        self.representatives = shift_time(self.representatives, delta)
        self.position = moved

    def write(self, slots: Tensor, blocks: dict[str, Tensor], *, in_place: Container[str]) -> None:
        """Put `blocks` [B, H, n, ...], by the name of their pool, into its slots [B, H, n]: those named in `in_place`
        where they are, the others into a copy, because autograd holds the pool."""
        here = [name for name in blocks if name in in_place]
        if here:
            put_slots_([getattr(self, name) for name in here], slots, [blocks[name] for name in here])
        for name in [name for name in blocks if name not in in_place]:
            pool = getattr(self, name)
            new = blocks[name].to(pool.dtype)
            setattr(self, name, pool.scatter(2, slot_index(slots, new), new))

    def read(self, name: str, slots: Tensor) -> Tensor:
        """[B, H, N, T, D] "keys" or "values" of `slots` [B, H, N], as they lie in the pool or would lie there."""
        pool = getattr(self, name)
        if self.history is None or pool.numel():
            return gather_slots(pool, slots)
        return self.history.blocks_in(name, slots, self.position)
