"""Swaps: cups cover objects, change places, and one of them is lifted.

What is under the lifted cup follows from every swap since the objects were seen, however long ago: a memory that keeps
what it saw, and no more, is at a loss beyond the number of swaps it was trained with.
"""

from __future__ import annotations

import random
from math import pi, sin

from sparse_forcing.scenes.vocabulary import SHAPES, SIZE_JITTER
from sparse_forcing.scenes.worlds.config import WorldConfig
from sparse_forcing.scenes.worlds.identities import draw_identities
from sparse_forcing.scenes.worlds.timeline import Timeline
from sparse_forcing.scenes.worlds.world import MARGIN, Box, Identity, Item, Panel, Plan

CUPS = (2, 3)
SIZES_UNDER = {2: ("small", "medium"), 3: ("small",)}
FLOOR = 0.74  # height of the objects' centres
LIFT_FRAMES = 4
SHOW = 4  # least frames in full view, before and after
SWAP_FRAMES = range(5, 11)
CUP_RGB, HANDLE_RGB = (105, 60, 25), (200, 170, 120)


def plan_swaps(rng: random.Random, config: WorldConfig) -> Plan:
    """Objects and cups; raises ConfigError where the clip is too short."""
    count = rng.choice(CUPS)
    asked, half = rng.randrange(count), _cup_half(SIZES_UNDER[count][-1])
    identities = draw_identities(rng, config.split, count + 1, returning=(asked,), sizes=SIZES_UNDER[count])
    swaps, length, inner = _choose(rng, config, identities[asked], half)
    slack = config.frames - _count_fixed(config) - inner
    early, late = sorted(rng.randint(0, slack) for _ in range(2))
    opening, show = config.opening_frames + early, SHOW + late - early

    places = [_place(cup, count) for cup in range(count)]
    across, along = [Timeline(place) for place in places], [Timeline(0.0) for _ in places]
    for line in (*across, *along):
        line.hold(opening + 2 * LIFT_FRAMES + show)
    order = list(range(count))
    for _ in range(swaps):
        _swap(rng, order, across, along, length)
    lifts = []
    for cup in range(count):
        lift = Timeline(0.0).hold(opening).move(1.0, LIFT_FRAMES).hold(show).move(0.0, LIFT_FRAMES).hold(inner)
        lifts.append(lift.move(1.0, LIFT_FRAMES) if cup == asked else lift)
    x = [line.until(config.frames) for line in across]
    y = [tuple(FLOOR - height for height in line.until(config.frames)) for line in along]
    items = [Item(identity=identities[cup], x=x[cup], y=y[cup]) for cup in range(count)]
    items.append(_passer(identities[count], opening, config.frames))
    panels = [panel for cup in range(count) for panel in _cup(x[cup], y[cup], lifts[cup].until(config.frames), half)]
    return Plan(items=items, panels=panels)


def _count_fixed(config: WorldConfig) -> int:
    """Frames of the least opening, cups up, a look, cups down, one cup up, a look."""
    return config.opening_frames + 3 * LIFT_FRAMES + 2 * SHOW


def _choose(
    rng: random.Random, config: WorldConfig, identity: Identity, half: tuple[float, float]
) -> tuple[int, int, int]:
    """How many swaps, frames of each, and frames between the cups' coming down and the one's going up."""
    room = config.frames - _count_fixed(config)
    fewest, most = config.swaps or (1, config.frames)
    # A cup hides its object before it is all the way down, a small one earlier than others.
    lower = identity.reach[2] + MARGIN
    hidden = 1 + 2 * sum(half[1] - _rise(half) * step / LIFT_FRAMES >= lower for step in range(1, LIFT_FRAMES))
    low, high = config.gap_range(hidden + fewest * SWAP_FRAMES[0], room + hidden, "swaps")
    inner = rng.randint(low, high) - hidden
    swaps = rng.randint(fewest, max(fewest, min(most, inner // SWAP_FRAMES[0])))
    return swaps, rng.choice([frames for frames in SWAP_FRAMES if swaps * frames <= inner]), inner


def _rise(half: tuple[float, float]) -> float:
    """How high a cup is lifted: its lower edge ends above every object."""
    return 2 * half[1] + 0.01


def _place(cup: int, count: int) -> float:
    return (cup + 0.5) / count


def _swap(rng: random.Random, order: list[int], across: list[Timeline], along: list[Timeline], frames: int) -> None:
    """Let two neighbours change places, one of them in an arc above the other, while the rest stays."""
    left = rng.randrange(len(order) - 1)
    pair = [order[left], order[left + 1]]
    high = rng.choice(pair)
    for cup, line in enumerate(across):
        if cup not in pair:
            line.hold(frames)
            along[cup].hold(frames)
            continue
        line.move(_place(left + (cup == pair[0]), len(order)), frames)
        arc = 2 * _cup_half(SIZES_UNDER[len(order)][-1])[1] * (cup == high)
        for step in range(frames):
            along[cup].jump(arc * sin(pi * (step + 1) / frames)).hold(1)
        along[cup].jump(0.0)
    order[left], order[left + 1] = order[left + 1], order[left]


def _passer(identity: Identity, opening: int, frames: int) -> Item:
    """An object above the cups that is there at the beginning and never again."""
    shown = tuple(frame < opening - 1 for frame in range(frames))
    return Item(identity=identity, x=(0.5,) * frames, y=(0.24,) * frames, shown=shown)


def _cup_half(size: str) -> tuple[float, float]:
    """Half the width and height of a cup that hides every shape of a size."""
    reaches = [Identity(colour="red", shape=shape, size=size, scale=1 + SIZE_JITTER).reach for shape in SHAPES]
    return max(reach[0] for reach in reaches) + MARGIN + 1e-3, max(max(reach[1:]) for reach in reaches) + MARGIN + 1e-3


def _cup(x: tuple[float, ...], y: tuple[float, ...], lift: tuple[float, ...], half: tuple[float, float]) -> list[Panel]:
    """A cup and its handle; lifted all the way its lower edge is above the object."""
    wide, high = half
    cups: list[Box] = []
    for across, down, share in zip(x, y, lift):
        middle = down - share * _rise(half)
        cups.append((across - wide, middle - high, across + wide, middle + high))
    handles = [(left + wide - 0.06, top + 0.03, left + wide + 0.06, top + 0.08) for left, top, _, _ in cups]
    return [Panel(rgb=CUP_RGB, boxes=tuple(cups)), Panel(rgb=HANDLE_RGB, boxes=tuple(handles))]
