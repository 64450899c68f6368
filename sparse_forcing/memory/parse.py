"""Memories written in a word: `full`, `window:8`, `sink:6,2`, `sparse:4,0.5,8,diversity`, `heavy_hitter:4,8`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory.config import KINDS, MemoryConfig

PARAMETERS: dict[str, tuple[tuple[str, type], ...]] = {
    "full": (),
    "window": (("window_frames", int),),
    "sink": (("window_frames", int), ("sink_frames", int)),
    "sparse": (("window_frames", int), ("density", float), ("persistent_blocks", int), ("retention", str)),
    "heavy_hitter": (("window_frames", int), ("persistent_blocks", int)),
}
"""What may follow each kind, in this order; what is left out stays as the model's default has it."""


def parse_memory(text: str, default: MemoryConfig) -> MemoryConfig:
    """`KIND[:VALUE,...]` as a memory that differs from `default` in what is said. An empty value leaves its place.

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
