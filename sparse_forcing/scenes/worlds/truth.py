"""What comes back in a world, when, where, and after how long: read from the positions alone, alike for every kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from sparse_forcing.scenes.worlds.world import HIDDEN, WHOLE, Box, World


@dataclass(frozen=True, kw_only=True)
class Return:
    """An object seen in full, out of sight, and seen in full again.

    ``first_seen``, ``seen_before`` and ``frames`` are ranges (begin, end) of frames in which it shows in full, end
    excluded: its first sight, the last one before the gap, and this return. ``last_seen`` is the last frame before the
    gap in which anything of it shows, ``gap`` counts the frames after that without any of it. ``boxes`` has one box
    for each frame of the return.
    """

    item: int
    colour: str
    shape: str
    size: str
    first_seen: tuple[int, int]
    seen_before: tuple[int, int]
    last_seen: int
    gap: int
    frames: tuple[int, int]
    boxes: tuple[Box, ...]


def find_returns(world: World) -> tuple[Return, ...]:
    """All returns of all objects, in the order in which they begin."""
    found = [entry for item in range(len(world.items)) for entry in _returns(world, item)]
    return tuple(sorted(found, key=lambda entry: (entry.frames, entry.item)))


def _returns(world: World, item: int) -> Iterator[Return]:
    visibility = world.visibility(item)
    whole: list[tuple[int, int]] = []
    last_seen, gap = -1, 0
    for shows, frames in _runs([value != HIDDEN for value in visibility]):
        if not shows:
            gap = frames[1] - frames[0]
            continue
        full = _longest_whole(visibility, frames)
        if full is not None:
            if whole and last_seen >= 0:
                yield _entry(world, item, whole, last_seen, gap, full)
            whole.append(full)
        last_seen = frames[1] - 1


def _entry(
    world: World, item: int, whole: list[tuple[int, int]], last_seen: int, gap: int, full: tuple[int, int]
) -> Return:
    thing = world.items[item]
    boxes = tuple(box for box in map(thing.box, range(*full)) if box is not None)
    identity = thing.identity
    return Return(
        item=item,
        colour=identity.colour,
        shape=identity.shape,
        size=identity.size,
        first_seen=whole[0],
        seen_before=whole[-1],
        last_seen=last_seen,
        gap=gap,
        frames=full,
        boxes=boxes,
    )


def _runs(values: list[bool]) -> Iterator[tuple[bool, tuple[int, int]]]:
    """Stretches of equal values with their (begin, end)."""
    begin = 0
    for value, group in groupby(values):
        end = begin + len(list(group))
        yield value, (begin, end)
        begin = end


def _longest_whole(visibility: list[int], frames: tuple[int, int]) -> tuple[int, int] | None:
    """The longest stretch of ``frames`` that shows the object in full."""
    runs = _runs([value == WHOLE for value in visibility[slice(*frames)]])
    full = [(frames[0] + begin, frames[0] + end) for value, (begin, end) in runs if value]
    return max(full, key=lambda run: run[1] - run[0], default=None)
