"""Worlds as lines of JSON: what is needed to draw one again, and what comes back in it, when and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from sparse_forcing.errors import ConfigError
from sparse_forcing.scenes.worlds.batch import draw_world
from sparse_forcing.scenes.worlds.config import WorldConfig
from sparse_forcing.scenes.worlds.truth import find_returns
from sparse_forcing.scenes.worlds.world import World

_DIGITS = 4  # of a box: a hundredth of a pixel


def write_record(world: World, config: WorldConfig) -> dict[str, Any]:
    """What there is to say of a world drawn with ``config``; frame ranges are [begin, end).

    ``returns`` pairs frame ranges of first sight and return with the object and its boxes, one for each frame of the
    return; ``boxes`` has for every frame the visible objects' boxes by number, ``objects`` their looks.
    """
    returns = [asdict(entry) | {"boxes": [_round(box) for box in entry.boxes]} for entry in find_returns(world)]
    boxes = [{str(item): _round(box) for item, box in frame.items()} for frame in world.visible_boxes()]
    looks = [item.identity for item in world.items]
    return {
        "world": {"kind": world.kind, "seed": world.seed, "index": world.index, "config": asdict(config)},
        "prompts": {str(frame): prompt for frame, prompt in world.prompts.items()},
        "returns": returns,
        "objects": [{"colour": look.colour, "shape": look.shape, "size": look.size} for look in looks],
        "boxes": boxes,
    }


def list_returns(world: World) -> list[dict[str, Any]]:
    """What comes back as the `returns` of a row that `evaluate --suite recall` reads, a box for each frame."""
    boxes = world.visible_boxes()
    rows = []
    for entry in find_returns(world):
        row: dict[str, Any] = {}
        for name, (begin, end) in (("first", entry.first_seen), ("again", entry.frames)):
            row |= {
                name: [begin, end],
                f"{name}_box": [_round(boxes[frame][entry.item]) for frame in range(begin, end)],
            }
        rows.append(row)
    return rows


def read_record(record: Mapping[str, Any]) -> World:
    """The world that was written; raises ConfigError where the record is not one of a world."""
    try:
        source = record["world"]
        given = {name: _setting(value) for name, value in source["config"].items()}
        known = {field.name for field in fields(WorldConfig)}
        if set(given) - known:
            raise ConfigError(f"world: unknown settings {', '.join(sorted(set(given) - known))}")
        return draw_world(source["kind"], source["seed"], source["index"], WorldConfig(**given))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"worlds: not a line of `data clips --world` ({type(error).__name__}: {error})") from error


def _setting(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _round(box: tuple[float, ...]) -> list[float]:
    return [round(edge, _DIGITS) for edge in box]
