"""What a rollout remembers: one configuration for every kind of memory, so that comparisons differ in it alone; and the
same in a word."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory.retention import find_rule

KINDS = ("full", "window", "sink", "sparse", "heavy_hitter")
POSITIONS = ("absolute", "relative")
CACHE_DTYPES = ("int8",)


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Kind of memory and its knobs; lengths in latent frames.

    Args:
        kind: full (Self-Forcing), window, sink (LongLive: window and the video's first frames), sparse (this method),
            heavy_hitter (H2O: window and single tokens, as many as the persistent blocks of `sparse` have).
        window_frames: recent frames kept, the current chunk included and, as in Self-Forcing, the sink too.
        sink_frames: first frames of the video that a `sink` memory never drops.
        tile: latent frames, token rows and token columns of a block.
        persistent_blocks: blocks per layer and head kept from everything that left the window; 0 for none.
        density: share of a full window's blocks that a query block attends to; 1 for all of them.
        retention: the rule that says which blocks persist (docs/memory.md): "paper", the last chunk's attention between
            block representatives; "mass", its exact attention mass; and others, one for each module of
            sparse_forcing.memory.retention.
        retention_decay: what is left, a chunk later, of attention that the accumulated and combined rules count.
        retention_weight: of attention in the combined rule, against unlikeness; from 0 to 1.
        retention_seed: of the random rule.
        cache_dtype: "int8" keeps a sparse memory's keys and values in 8 bits; None: as they are computed.
        positions: absolute (Self-Forcing's) or relative: the current chunk never moves beyond the training horizon
            and older keys are re-phased when the window moves.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {"top_k": "density", "importance": "retention"}

    kind: str = "sparse"
    window_frames: int = 6
    sink_frames: int = 3
    tile: tuple[int, int, int] = (3, 5, 4)
    persistent_blocks: int = 32
    density: float = 0.25
    retention: str = "paper"
    retention_decay: float = 0.9
    retention_weight: float = 0.5
    retention_seed: int = 0
    positions: str = "relative"
    cache_dtype: str | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, KINDS),
            ("positions", self.positions, POSITIONS),
        ):
            if value not in known:
                raise ConfigError(f"memory.{name}: expected one of {', '.join(known)}, got {value!r}")
        if self.cache_dtype not in (None, *CACHE_DTYPES):
            raise ConfigError(f"memory.cache_dtype: expected int8 or nothing, got {self.cache_dtype!r:.60}")
        find_rule(self.retention)
        if not 0 <= self.retention_decay <= 1:
            raise ConfigError(f"memory.retention_decay: a share in [0, 1] is needed, got {self.retention_decay}")
        if not 0 <= self.retention_weight <= 1:
            raise ConfigError(f"memory.retention_weight: a share in [0, 1] is needed, got {self.retention_weight}")
        if self.window_frames < 1:
            raise ConfigError(f"memory.window_frames: at least 1 latent frame is needed, got {self.window_frames}")
        if self.kind == "sink" and not 1 <= self.sink_frames < self.window_frames:
            raise ConfigError(
                f"memory.sink_frames: must be in [1, window_frames = {self.window_frames}), got {self.sink_frames}"
            )
        if len(self.tile) != 3 or min(self.tile) < 1:
            raise ConfigError(f"memory.tile: expected three positive numbers (frames, rows, columns), got {self.tile}")
        if self.persistent_blocks < 0:
            raise ConfigError(f"memory.persistent_blocks: cannot be negative, got {self.persistent_blocks}")
        if not 0 < self.density <= 1:
            raise ConfigError(f"memory.density: a share in (0, 1] is needed, got {self.density}")

    @property
    def window(self) -> int | None:
        """Window in frames, or None for a full memory."""
        return None if self.kind == "full" else self.window_frames

    @property
    def persistent_tokens(self) -> int:
        """Tokens of the persistent blocks, per layer and head: also the number of heavy hitters."""
        return self.persistent_blocks * math.prod(self.tile)

    @property
    def sees_whole_frames(self) -> bool:
        """True when every layer and head sees the same frames, which a frame mask can express."""
        return self.kind in ("full", "window", "sink")

    @property
    def sink(self) -> int:
        """First latent frames that are never dropped; 0 for every kind but `sink`."""
        return self.sink_frames if self.kind == "sink" else 0


PARAMETERS: dict[str, tuple[tuple[str, type], ...]] = {
    "full": (),
    "window": (("window_frames", int),),
    "sink": (("window_frames", int), ("sink_frames", int)),
    "sparse": (
        ("window_frames", int),
        ("density", float),
        ("persistent_blocks", int),
        ("retention", str),
        ("cache_dtype", str),
    ),
    "heavy_hitter": (("window_frames", int), ("persistent_blocks", int)),
}
"""What may follow each kind, in this order; what is left out stays as the model's default has it."""


def parse_memory(text: str, default: MemoryConfig) -> MemoryConfig:
    """`KIND[:VALUE,...]` as a memory that differs from `default` in what is said: `full`, `window:8`, `sink:6,2`,
    `sparse:4,0.5,8,diversity,int8`, `heavy_hitter:4,8`. An empty value leaves its place.

    Raises:
        ConfigError: an unknown kind, too many values, or one that is no number.
    """
    kind, colon, rest = text.partition(":")
    if kind not in KINDS:
        raise ConfigError(f"memory {text!r}: the kind is one of {', '.join(KINDS)}")
    names, values = PARAMETERS[kind], rest.split(",") if colon else []
    if len(values) > len(names):
        raise ConfigError(f"memory {text!r}: {kind} takes {', '.join(name for name, _ in names) or 'nothing'}")
    changes: dict[str, Any] = {}
    for (name, convert), value in zip(names, values):
        if not value:
            continue
        try:
            changes[name] = convert(value)
        except ValueError as error:
            raise ConfigError(f"memory {text!r}: {name} is a number, got {value!r}") from error
    try:
        return replace(default, kind=kind, **changes)
    except ConfigError as error:
        raise ConfigError(f"memory {text!r}: {error}") from error
