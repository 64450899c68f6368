"""The interface of every rollout memory, and the positions they share.

A rollout calls `begin_chunk`, then runs the model any number of times with `denoising_pass()` as its attention policy
(each pass overwrites the chunk's own entries) and once, on the finished chunk, with `clean_pass()`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory.config import MemoryConfig
from sparse_forcing.model.attention import TokenOrder
from sparse_forcing.model.rope import Rotary, rotary_table

REWRITTEN = ("window", "sink", "sparse")
"""Kinds of memory whose window can be written again."""
CACHE_GRADIENTS = ("none", "detached", "straight_through", "clean")
Choices = dict[int, Tensor]
"""The lists of slots that each layer chose."""


@dataclass(frozen=True, kw_only=True)
class MemoryGeometry:
    """Sizes a memory is made for.

    Args:
        rows, cols: tokens of a latent frame.
        num_layers: self-attention layers.
        chunk_frames: latent frames of a (usual) chunk.
        horizon_frames: latent frames the model was trained on; relative positions stay below it.
        capacity_frames: latent frames the rollout will reach, if known (spares a full memory its growth).
    """

    rows: int
    cols: int
    num_layers: int
    chunk_frames: int
    horizon_frames: int
    capacity_frames: int | None = None

    @classmethod
    def of(
        cls,
        transformer: Mapping[str, Any],
        rows: int,
        cols: int,
        *,
        capacity_frames: int | None = None,
        chunk_frames: int | None = None,
    ) -> MemoryGeometry:
        """Of a transformer's config and the tokens of its latent frames; `chunk_frames` in place of the config's."""
        return cls(
            rows=rows,
            cols=cols,
            capacity_frames=capacity_frames,
            num_layers=transformer["num_layers"],
            chunk_frames=chunk_frames or transformer["chunk_frames"],
            horizon_frames=transformer["horizon_frames"],
        )

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of a latent frame."""
        return self.rows * self.cols


class MemoryPass:
    """Attention policy of one forward pass over the current chunk."""

    stops_early: ClassVar[bool] = True
    """Whether a clean pass ends with its last layer's keys and values: nobody reads what would come after them. One
    with gradients never does, because sharded layers count on what a layer gives being used."""

    def __init__(self, memory: RolloutMemory, clean: bool) -> None:
        self.memory = memory
        self.clean = clean
        # Gradient checkpointing runs a layer a second time in the backward pass, when the rollout has moved on: the
        # second run sees the memory as it was before this pass, and leaves the real one alone.
        keeps_history = torch.is_grad_enabled() and memory.cache_gradient != "none"
        self._before = memory.snapshot() if keeps_history else None
        self._written: set[int] = set()
        self._choices: Choices | None = {} if keeps_history else None
        ends = self.stops_early and clean and not torch.is_grad_enabled()
        self._ends_at = memory.geometry.num_layers - 1 if ends else None

    def token_order(self, device: torch.device) -> TokenOrder | None:
        """The memory's order of the chunk's tokens."""
        return self.memory.token_order(device)

    def rotary(self, rows: int, cols: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Rotary:
        """Rotary table of the chunk, frame by frame, at the positions the memory gives it.

        Raises:
            ConfigError: the grid of tokens is not the one the memory was made for.
        """
        geometry = self.memory.geometry
        if (rows, cols) != (geometry.rows, geometry.cols):
            raise ConfigError(f"memory: made for {geometry.rows}x{geometry.cols} tokens a frame, got {rows}x{cols}")
        return self.memory.rotary(head_dim, dtype, device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """Leave a layer's keys and values [B, L, H, D] in the memory; returns the attention [B, L, H, D], and None in
        the last layer of a clean pass."""
        memory = self.memory
        if self._before is not None:
            memory = self._before if layer in self._written else memory
            self._written.add(layer)
        ends = layer == self._ends_at
        found = memory.attend(layer, query, key, value, clean=self.clean, choices=self._choices, ends=ends)
        return None if ends else found


@dataclass(frozen=True, kw_only=True)
class WindowPass:
    """What an observer sees of one layer in one denoising pass.

    queries: [B, H, n, T, D] blocks of the chunk; keys: [B, H, W, T, D] of the window's blocks;
    key_sizes: [B, H, W] int32 tokens of each, None while all are full; mass: [B, H, n, W] that dense attention over
    the window gives each; full: whether the window holds as many blocks as it can.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    key_sizes: Tensor | None
    mass: Tensor
    full: bool


class WindowObserver(Protocol):
    def __call__(self, seen: WindowPass) -> None: ...


class RolloutMemory(ABC):
    """Keys and values of earlier chunks, per layer.

    Args:
        cache_gradient: "none" writes in place (inference). The others never modify a tensor that autograd may hold:
            "detached" stops gradients at the cache; "straight_through" gives cached entries the clean pass's values
            and the gradient of the pass that produced the chunk, as Self-Forcing's released weights were trained;
            "clean" keeps the gradient of the clean pass itself, as the parallel form of teacher forcing does.

    Attributes:
        selector_losses: what passes with gradients have appended since `distil_selectors` was called; who takes them
            clears the list. Memories that choose no blocks leave it empty.
    """

    remembers: ClassVar[bool] = True
    """Whether a finished chunk leaves anything behind, for which a clean pass is worth its time."""

    def __init__(self, config: MemoryConfig, geometry: MemoryGeometry, cache_gradient: str = "none") -> None:
        if cache_gradient not in CACHE_GRADIENTS:
            raise ConfigError(f"cache_gradient: expected one of {', '.join(CACHE_GRADIENTS)}, got {cache_gradient!r}")
        self.config = config
        self.geometry = geometry
        self.cache_gradient = cache_gradient
        self.chunk_frames = 0
        self.chunk_position = 0
        self.next_frame = 0
        self.selector_losses: list[Tensor] = []
        self._rotary: Rotary | None = None
        self._rotary_of: tuple[int, int, int, torch.dtype, torch.device] = (0, 0, 0, torch.float32, torch.device("cpu"))

    def token_order(self, device: torch.device) -> TokenOrder | None:
        """Token order of the current chunk's passes (see AttentionPolicy)."""
        return None

    @property
    def shapes(self) -> Hashable:
        """What a pass over the current chunk takes from Python: sizes, counts and where its state lies. While it stays
        as it is, the same calls on the same tensors are the next chunk's passes. None where that cannot be said."""
        return None

    def begin_chunk(self, frames: int) -> None:
        """Make room for a chunk of `frames` latent frames: evict, update the persistent set, move positions."""
        if self.config.window is not None and frames + self.config.sink > self.config.window:
            raise ConfigError(
                f"memory.window_frames: {self.config.window} is less than a chunk of {frames} latent frames"
                + (f" and a sink of {self.config.sink}" if self.config.sink else "")
            )
        self._make_room(frames)
        start = self.chunk_position + self.chunk_frames
        if self.config.positions == "relative":
            anchor = max(self.geometry.horizon_frames, self.config.window or 0) - self.geometry.chunk_frames
            if start > max(anchor, 0):
                self._move_positions(max(anchor, 0) - start)
                start = max(anchor, 0)
        self.next_frame += self.chunk_frames
        self.chunk_position, self.chunk_frames = start, frames
        if self._rotary is not None:
            self.rotary(*self._rotary_of[2:])

    def rewind(self, chunks: Sequence[int]) -> int:
        """Take the last finished chunks, of so many latent frames each, out of the window again, as far as it holds
        them whole; returns how many it took. Each is then begun again, in order, and written by a clean pass."""
        count = self._rewind(chunks)
        if count:
            total = sum(chunks[-count:])
            self.chunk_position += self.chunk_frames - total
            self.next_frame += self.chunk_frames - total
            self.chunk_frames = 0
        return count

    def begin_again(self, frames: int) -> None:
        """Make the next chunk that was taken out the current one, where it was."""
        self.next_frame += self.chunk_frames
        self.chunk_position, self.chunk_frames = self.chunk_position + self.chunk_frames, frames
        if self._rotary is not None:
            self.rotary(*self._rotary_of[2:])

    def _rewind(self, chunks: Sequence[int]) -> int:
        raise ConfigError(f"recache: {', '.join(REWRITTEN)} memories can be written again, not {self.config.kind}")

    def rotary(self, head_dim: int, dtype: torch.dtype, device: torch.device) -> Rotary:
        """Rotary table of the current chunk, in its tokens' order; made once a chunk, in one place where no pass may
        still need the last chunk's."""
        wanted = (self.chunk_position, self.chunk_frames, head_dim, dtype, device)
        if self._rotary is None or self._rotary_of != wanted:
            frames = torch.arange(self.chunk_position, self.chunk_position + self.chunk_frames, device=device)
            table = rotary_table(frames, self.geometry.rows, self.geometry.cols, head_dim, dtype)
            order = self.token_order(device)
            table = table if order is None else table.permute(order.order)
            if self._rotary is not None and self.cache_gradient == "none" and self._rotary_of[1:] == wanted[1:]:
                for old, new in zip(self._rotary, table):
                    old.copy_(new)
            else:
                self._rotary = table
            self._rotary_of = wanted
        return self._rotary

    def denoising_pass(self) -> MemoryPass:
        """The attention policy of a pass over the unfinished chunk."""
        return MemoryPass(self, clean=False)

    def clean_pass(self) -> MemoryPass:
        """The attention policy of the pass that leaves the finished chunk in the memory."""
        return MemoryPass(self, clean=True)

    def snapshot(self) -> RolloutMemory:
        """A memory with the same state that changes on its own; tensors are shared, so nothing may be written in place
        (cache_gradient other than "none")."""
        twin = copy.copy(self)
        vars(twin).update({name: list(value) for name, value in vars(self).items() if isinstance(value, list)})
        return twin

    def state_dict(self) -> dict[str, Any]:
        """What a memory of the same configuration, geometry and model goes on from after a clean pass, for
        `load_state_dict`: numbers and tensors, those of the memory itself, which its next chunk changes."""
        assert self.cache_gradient == "none", "only memories of inference have a state"
        numbers = {name: getattr(self, name) for name in ("chunk_frames", "chunk_position", "next_frame")}
        return {**numbers, **self._own_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on, before the first chunk, from what `state_dict` of another memory gave."""
        for name in ("chunk_frames", "chunk_position", "next_frame"):
            setattr(self, name, state[name])
        self._load_own_state(state)

    @abstractmethod
    def _own_state(self) -> dict[str, Any]:
        """What `state_dict` holds of this kind of memory."""

    @abstractmethod
    def _load_own_state(self, state: Mapping[str, Any]) -> None: ...

    def history(self) -> AbstractContextManager:
        """Context of writes to the cache: passes without gradients must not cut the history that earlier chunks carry
        when gradients go straight through; when they stop at the cache, nothing may carry any."""
        return torch.enable_grad() if self.cache_gradient == "straight_through" else nullcontext()

    def merge_clean(self, stored: Tensor, clean: Tensor) -> Tensor:
        """What the clean pass leaves in the cache, given what the last denoising pass stored. With "clean" it must run
        with gradients, or the chunk has none."""
        if self.cache_gradient == "straight_through":
            return stored + (clean - stored).detach()
        return clean

    def distil_selectors(self, layers: frozenset[int]) -> None:
        """From now on passes with gradients append the block selector's distillation loss of these layers to
        `selector_losses`. Raises ConfigError where no selector can learn."""
        raise ConfigError(f"memory.kind: {self.config.kind} has no learned selector to distil; use sparse")

    def observe_window(self, observer: WindowObserver) -> None:
        """Call `observer` in every layer of every denoising pass, for measurements. Raises ConfigError where there is
        no window of blocks."""
        raise ConfigError(f"memory.kind: {self.config.kind} has no window of blocks to observe; use sparse")

    def persistent_map(self, chunk: int | None = None) -> Tensor | None:
        """Where what persists comes from: [f, rows, cols] in [0, 1], the share of layers and heads that keep something
        of this place, of one chunk or (None) of any, for the first sample; None while nothing persists."""
        return None

    @abstractmethod
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
        """Write the chunk's keys and values [B, L, H, D] and return the attention of its queries.

        choices: what each layer chose when this pass ran it first; a second run repeats it, however it rounds. None
            where no layer is run again.
        ends: nobody reads the attention, so that it is only computed, and returned, where the memory itself needs it.
        """

    @abstractmethod
    def _make_room(self, frames: int) -> None: ...

    @abstractmethod
    def _move_positions(self, frames: int) -> None:
        """Move every cached key by `frames` (negative: into the past), none below its floor."""

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes of every tensor the memory holds now."""
