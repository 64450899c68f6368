"""Reappear: an object goes behind a wall at one side of the screen and comes out of it again.

Planned with the wall to the right, then turned to any side. A bar on the wall runs out when the object is due, a mark
at the wall's edge says at which height. Whatever else comes by enters and leaves at the open side, so that only one
object is behind the wall.
"""

from __future__ import annotations

import random
from math import ceil

from sparse_forcing.scenes.worlds.config import WorldConfig
from sparse_forcing.scenes.worlds.identities import draw_identities
from sparse_forcing.scenes.worlds.timeline import Timeline
from sparse_forcing.scenes.worlds.world import MARGIN, Box, Identity, Item, Panel, Plan

WALL = 0.7  # where it begins
WALL_RGB = ((105, 60, 25), (10, 20, 105), (0, 90, 40))
BAR_RGB, MARK_RGB = (235, 235, 235), (0, 0, 0)
SPEEDS = tuple(step / 100 for step in range(12, 3, -1))  # per frame, fastest first
PAUSE = 4  # least frames in full view, before and after the gap
SIDES = ("right", "left", "bottom", "top")


class _Ways:
    """Frames of the ways of an object at a speed: in or out at the open side, and between its place and the wall."""

    def __init__(self, identity: Identity, speed: float, wall_side: str) -> None:
        extent = identity.extent
        self.outside, self.place, self.behind = -extent - 0.01, WALL / 2, WALL + 2 * MARGIN + extent
        self.open = ceil((self.place - self.outside) / speed)
        self.wall = ceil((self.behind - self.place) / speed)
        step = (self.behind - self.place) / self.wall
        side, up, down = identity.reach
        last = {"bottom": up, "top": down}.get(wall_side, side)  # how far reaches what goes in last
        # Frames that end or begin a way behind the wall with nothing of the object in sight.
        self.hidden = sum(self.place + step * (frame + 1) - last >= WALL + MARGIN for frame in range(self.wall))


def plan_reappear(rng: random.Random, config: WorldConfig) -> Plan:
    """Objects and panels; raises ConfigError where the clip is too short for the gap."""
    wall_side = rng.choice(SIDES)
    first, subject, passer = draw_identities(rng, config.split, 3, returning=(1,))
    room = config.frames - config.opening_frames

    def least(speed: float) -> int:  # without the frames in which the subject is hidden
        ways, leave = _Ways(subject, speed, wall_side), _Ways(first, speed, wall_side).open
        return leave + ways.open + 2 * ways.wall + 2 * PAUSE - 2 * ways.hidden + 1

    shortest = 2 * _Ways(subject, SPEEDS[0], wall_side).hidden - 1
    low, high = config.gap_range(shortest, room - least(SPEEDS[0]), "reappear")
    gap = rng.randint(low, high)
    usable = [speed for speed in SPEEDS if least(speed) + gap <= room]
    speed = rng.choice([speed for speed in usable if 2 * _Ways(subject, speed, wall_side).hidden - 1 <= gap])
    ways, lead_ways = _Ways(subject, speed, wall_side), _Ways(first, speed, wall_side)
    slack = room - least(speed) - gap
    early, late = sorted(rng.randint(0, slack) for _ in range(2))

    lead = Timeline(lead_ways.place).hold(config.opening_frames + early).move(lead_ways.outside, lead_ways.open)
    main = Timeline(ways.outside).hold(len(lead)).move(ways.place, ways.open).hold(PAUSE + late - early)
    main.move(ways.behind, ways.wall)
    hidden_from = len(main) - ways.hidden
    main.hold(gap - 2 * ways.hidden + 1)
    main.move(ways.place, ways.wall)

    courses = [(first, lead), (subject, main)]
    passing = _plan_passing(rng, config, _Ways(passer, speed, wall_side), hidden_from, gap)
    courses += [(passer, passing)] if passing is not None else []
    heights = [_height(rng, identity) for identity, _ in courses]
    items = [
        _turn_item(identity, course.until(config.frames), height, wall_side)
        for (identity, course), height in zip(courses, heights)
    ]
    wall = rng.choice(WALL_RGB)
    return Plan(items=items, panels=_panels(wall, wall_side, heights[1], hidden_from, gap, config.frames))


def _plan_passing(rng: random.Random, config: WorldConfig, ways: _Ways, begin: int, gap: int) -> Timeline | None:
    """An object that comes and goes while the subject is hidden, where there is time for it."""
    slack = gap - 2 * ways.open - PAUSE
    if slack < 0 or rng.random() >= config.distractor_fraction:
        return None
    wait, stay = sorted(rng.randint(0, slack) for _ in range(2))
    course = Timeline(ways.outside).hold(begin + wait).move(ways.place, ways.open)
    return course.hold(PAUSE + stay - wait).move(ways.outside, ways.open)


def _height(rng: random.Random, identity: Identity) -> float:
    return rng.uniform(identity.extent + 0.02, 0.98 - identity.extent)


def _panels(rgb: tuple[int, int, int], wall_side: str, height: float, begin: int, gap: int, frames: int) -> list[Panel]:
    """The wall, the mark where the object goes in and out, and the bar that runs out over the gap."""
    wall = _turn_box((WALL, 0.0, 1.0, 1.0), wall_side)
    mark = _turn_box((WALL + 0.02, height - 0.05, WALL + 0.08, height + 0.05), wall_side)
    bars = []
    for frame in range(frames):
        left = min(max((begin + gap - frame) / gap, 0.0), 1.0)
        bars.append(_turn_box((0.86, 0.05, 0.94, 0.05 + 0.9 * left), wall_side))
    return [
        Panel(rgb=rgb, boxes=(wall,) * frames),
        Panel(rgb=MARK_RGB, boxes=(mark,) * frames),
        Panel(rgb=BAR_RGB, boxes=tuple(bars)),
    ]


def _turn_item(identity: Identity, course: tuple[float, ...], height: float, wall_side: str) -> Item:
    along = course if wall_side in ("right", "bottom") else tuple(1 - place for place in course)
    across = (height,) * len(course)
    x, y = (along, across) if wall_side in ("right", "left") else (across, along)
    return Item(identity=identity, x=x, y=y)


def _turn_box(box: Box, wall_side: str) -> Box:
    """A box of the plan on the screen, as :func:`_turn_item` turns objects."""
    left, top, right, bottom = box
    if wall_side in ("left", "top"):
        left, right = 1 - right, 1 - left
    return (left, top, right, bottom) if wall_side in ("right", "left") else (top, left, bottom, right)
