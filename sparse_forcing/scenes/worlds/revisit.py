"""Revisit: the camera goes along a strip with an object on every screen, to its end and back.

It moves at one speed and turns where it sees the wall at the strip's end, so that the last frames always say where it
will be next; only what stands there has to be remembered. It begins on screens it never comes to again. The place of
the object whose return ends the clip is called A; lengths along the strip are in screens.
"""

from __future__ import annotations

import random
from dataclasses import replace
from math import ceil

from sparse_forcing.scenes.worlds.config import WorldConfig
from sparse_forcing.scenes.worlds.identities import draw_identities
from sparse_forcing.scenes.worlds.world import Box, Identity, Item, Panel, Plan

FASTEST, STEP_FRAMES = 6, 16  # frames from one screen to the next: at least, and where there is time
LEAST_SCREENS, MOST_SCREENS = 5, 12  # of a clip: shorter ones go faster, longer ones slower
PAST = 1 / 8  # how far beyond A the clip ends
WALL_IN_VIEW = 0.25  # of the screen, when the camera turns
WALL_RGB = (20, 20, 24)
OFF_CENTRE = 0.06  # of an object on its screen, at most
BEFORE_WALL = 0.02


def plan_revisit(rng: random.Random, config: WorldConfig) -> Plan:
    """Objects and camera positions; raises ConfigError where the clip is too short for the gap."""
    step = max(FASTEST, min(STEP_FRAMES, config.frames // LEAST_SCREENS), ceil(config.frames / MOST_SCREENS))
    home = ceil(config.frames / step)  # the screen of A: as many before it as the clip can show
    count = home + home // 2 + 2
    identities = draw_identities(rng, config.split, count, returning=range(home, count))
    places = [_stand(rng, identity) for identity in identities]

    camera = _travel(rng, config, step, places[home][0] + identities[home].reach[0])
    wall = max(camera) + 1 - WALL_IN_VIEW
    items, left = [], min(camera)
    for screen, (identity, (x, y)) in enumerate(zip(identities, places), -home):
        side = identity.reach[0]
        if screen + x + side > left and screen + x + side + BEFORE_WALL <= wall:
            way = tuple(screen + x - place for place in camera)
            items.append(Item(identity=identity, x=way, y=(y,) * config.frames))
    walls = tuple((wall - place, 0.0, 2.0, 1.0) for place in camera)
    if rng.random() < 0.5:
        return _mirror(items, walls, camera)
    return Plan(items=items, panels=[Panel(rgb=WALL_RGB, boxes=walls)], camera=camera)


def _stand(rng: random.Random, identity: Identity) -> tuple[float, float]:
    """Where an object stands on its screen."""
    _, up, down = identity.reach
    return 0.5 + rng.uniform(-OFF_CENTRE, OFF_CENTRE), rng.uniform(up + 0.02, 0.98 - down)


def _travel(rng: random.Random, config: WorldConfig, step: int, right: float) -> tuple[float, ...]:
    """Camera positions from A's screen, frame by frame: from before it to the end of the strip and back.

    ``right`` is how far A's object reaches on its screen: it is out of sight from so far on.
    """
    leave, past = ceil(right * step), ceil(PAST * step)
    longest = config.frames - config.opening_frames - 3 * leave - past
    least, most = config.gap_range(1, longest, "revisit")
    gap = rng.randint(least, most)
    out = leave + (gap - 1) // 2
    turned = [out] * ((gap - 1) % 2)
    back = range(out - 1, -past - 1, -1)
    before = config.frames - 1 - out - len(turned) - len(back)
    return tuple(frames / step for frames in (*range(-before, out + 1), *turned, *back))


def _mirror(items: list[Item], walls: tuple[Box, ...], camera: tuple[float, ...]) -> Plan:
    """The same with left and right exchanged."""
    items = [replace(item, x=tuple(1 - x for x in item.x)) for item in items]
    boxes = tuple((1 - right, top, 1 - left, bottom) for left, top, right, bottom in walls)
    return Plan(items=items, panels=[Panel(rgb=WALL_RGB, boxes=boxes)], camera=tuple(-place for place in camera))
