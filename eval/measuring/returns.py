"""What comes back in a video: pairs of a first sight and a return, as a row of a manifest says them.

    {"video": "a.mp4", "returns": [{"first": [0, 24], "again": [60, 80], "again_box": [0.2, 0.1, 0.6, 0.9]}]}

Frames are [begin, end) with the end left out. A box (`first_box`, `again_box`) is left, top, right, bottom in shares of
the picture, or a list of such, one for each frame of its range; without one the whole picture is compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sparse_forcing.errors import ConfigError

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
MOST_FRAMES = 16  # of a range: as many are looked at, evenly spread
MOST_RETURNS = 1000
_KEYS = {"first", "again", "first_box", "again_box"}


@dataclass(frozen=True)
class Sight:
    """Frames [begin, end) in which something shows, and where: one box, or one for each frame."""

    begin: int
    end: int
    boxes: tuple[Box, ...] = (WHOLE,)

    def pick(self) -> list[tuple[int, Box]]:
        """Frame numbers, at most `MOST_FRAMES` of them, each with its box."""
        count = self.end - self.begin
        steps = [number * count // min(count, MOST_FRAMES) for number in range(min(count, MOST_FRAMES))]
        return [(self.begin + step, self.boxes[step if len(self.boxes) > 1 else 0]) for step in steps]


@dataclass(frozen=True)
class SightPair:
    """Something's first sight and its return."""

    first: Sight
    again: Sight

    def between(self) -> Sight | None:
        """The frames between the two, at the place of the return; None where there are none."""
        boxes = (self.again.boxes[0],)
        return Sight(self.first.end, self.again.begin, boxes) if self.first.end < self.again.begin else None


def parse_returns(value: Any) -> tuple[SightPair, ...]:
    """The `returns` of a row. Raises ConfigError, which says what is wrong with which of them."""
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MOST_RETURNS:
        raise ConfigError(f"returns must be a list of at most {MOST_RETURNS} objects, not {value!r:.60}")
    return tuple(_parse_pair(f"returns[{number}]", pair) for number, pair in enumerate(value))


def _parse_pair(where: str, pair: Any) -> SightPair:
    if not isinstance(pair, dict) or not {"first", "again"} <= pair.keys() <= _KEYS:
        raise ConfigError(f"{where} must have first and again, and may have first_box and again_box: {pair!r:.80}")
    first, again = (_parse_sight(where, pair, name) for name in ("first", "again"))
    if first.end > again.begin:
        raise ConfigError(f"{where}: again begins at frame {again.begin}, before first ends at {first.end}")
    return SightPair(first, again)


def _parse_sight(where: str, pair: dict[str, Any], name: str) -> Sight:
    frames = pair[name]
    whole = isinstance(frames, list) and len(frames) == 2 and all(type(number) is int for number in frames)
    if not whole or not 0 <= frames[0] < frames[1]:
        raise ConfigError(f"{where}.{name} must be two frame numbers, 0 <= begin < end, not {frames!r:.60}")
    given = pair.get(f"{name}_box")
    if given is None:
        return Sight(*frames)
    boxes = [given] if not _is_list_of_lists(given) else given
    if len(boxes) not in (1, frames[1] - frames[0]) or not all(map(_is_box, boxes)):
        raise ConfigError(
            f"{where}.{name}_box must be left, top, right, bottom in shares of the picture, or one such for each of "
            f"its {frames[1] - frames[0]} frames, not {given!r:.60}"
        )
    return Sight(
        frames[0],
        frames[1],
        tuple((float(left), float(top), float(right), float(bottom)) for left, top, right, bottom in boxes),
    )


def write_returns(pairs: tuple[SightPair, ...]) -> list[dict[str, Any]]:
    """The `returns` of a row that `parse_returns` reads as these pairs."""
    rows = []
    for pair in pairs:
        row: dict[str, Any] = {}
        for name, sight in (("first", pair.first), ("again", pair.again)):
            row[name] = [sight.begin, sight.end]
            if sight.boxes != (WHOLE,):
                row[f"{name}_box"] = [list(box) for box in sight.boxes]
        rows.append(row)
    return rows


def _is_list_of_lists(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], list)


def _is_box(value: Any) -> bool:
    numbers = isinstance(value, list) and len(value) == 4 and all(type(edge) in (int, float) for edge in value)
    if not numbers or not all(map(math.isfinite, value)):
        return False
    left, top, right, bottom = value
    return left < min(right, 1) and top < min(bottom, 1) and right > 0 and bottom > 0
