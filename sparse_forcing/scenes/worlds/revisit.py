"""Revisit: the camera goes along a strip with an object on every screen, out and back (A B A, A B C B A).

It begins on screens it never comes to again. The place of the first object that returns is called A, the far screens
B, C, ...; positions along the path are in screens from where the camera starts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

from sparse_forcing.scenes.worlds.config import WorldConfig
from sparse_forcing.scenes.worlds.identities import draw_identities
from sparse_forcing.scenes.worlds.timeline import Timeline
from sparse_forcing.scenes.worlds.world import Identity, Item, Plan

STEP_FRAMES = range(6, 19)  # from one screen to the next
PAUSE = 4  # least frames at A, before and after
MOST_AWAY = 4  # screens from A to the farthest
MOST_OPENING = 4  # screens before A
OFF_CENTRE = 0.12  # of an object on its screen, at most


@dataclass(frozen=True, kw_only=True)
class _Trip:
    """From A out to ``away`` screens beyond and back, ``step`` frames a screen; A stays hidden for ``hidden`` frames
    when nothing is waited for."""

    step: int
    away: int
    hidden: int

    @property
    def least(self) -> int:
        """Frames from the first step towards A to the end, less those in which A is hidden."""
        return self.step + 2 * PAUSE + 2 * self.away * self.step - self.hidden


def plan_revisit(rng: random.Random, config: WorldConfig) -> Plan:
    """Objects and camera positions; raises ConfigError where the clip is too short for the gap."""
    count = MOST_OPENING + 1 + MOST_AWAY
    identities = draw_identities(rng, config.split, count, returning=range(MOST_OPENING, count))
    middle, height = [0.0] * count, [0.5] * count
    for number, identity in enumerate(identities):
        side, up, down = identity.reach
        play = min(OFF_CENTRE, 0.48 - side)
        middle[number], height[number] = 0.5 + rng.uniform(-play, play), rng.uniform(up + 0.02, 0.98 - down)
    shift = middle[MOST_OPENING] - 0.5
    trip, gap = _choose(rng, config, identities[MOST_OPENING], shift)
    slack = config.frames - config.opening_frames - trip.least - gap
    early, late = sorted(rng.randint(0, slack) for _ in range(2))
    opening, stay = config.opening_frames + early, PAUSE + late - early
    before = min(MOST_OPENING, 1 + rng.randint(0, max(0, (opening - config.opening_frames) // (trip.step + PAUSE))))

    path = _opening(rng, before, opening, trip.step).move(before, trip.step).hold(stay)
    _away(rng, path, before, trip, gap - trip.hidden)
    camera = path.until(config.frames)
    skipped = MOST_OPENING - before  # as many of the screens of the beginning are not there
    identities, middle, height = identities[skipped:], middle[skipped:], height[skipped:]
    if rng.random() < 0.5:
        camera, middle = tuple(-place for place in camera), [1 - place for place in middle]
        ways = range(0, -len(identities), -1)
    else:
        ways = range(len(identities))
    items = [
        Item(identity=identity, x=tuple(way + x - place for place in camera), y=(y,) * config.frames)
        for identity, way, x, y in zip(identities, ways, middle, height)
    ]
    seen = max(map(abs, camera)) + 1
    return Plan(items=items[: int(seen + 0.999)], camera=camera)


def _choose(rng: random.Random, config: WorldConfig, identity: Identity, shift: float) -> tuple[_Trip, int]:
    """A gap among those asked for, and a trip among those that leave time for it."""
    reach = 0.5 + identity.reach[0] + shift  # as far as the camera must go until A has left the screen
    trips = []
    for step in STEP_FRAMES:
        for away in range(1, MOST_AWAY + 1):
            way = [way / step for way in range(1, away * step + 1)]
            hidden = sum(place >= reach for place in way) + sum(place >= reach for place in way[:-1])
            trips.append(_Trip(step=step, away=away, hidden=hidden))
    room = config.frames - config.opening_frames
    fitting = [trip for trip in trips if trip.least + trip.hidden <= room]
    shortest = min((trip.hidden for trip in trips), default=1)
    longest = room - min(trip.least for trip in fitting) if fitting else 0
    least, most = config.gap_range(shortest, longest, "revisit")
    gap = rng.randint(least, most)
    usable = [trip for trip in fitting if trip.hidden <= gap and trip.least + gap <= room]
    away = rng.choice(sorted({trip.away for trip in usable}))
    return rng.choice([trip for trip in usable if trip.away == away]), gap


def _opening(rng: random.Random, before: int, frames: int, step: int) -> Timeline:
    """The screens 0 to ``before`` - 1, so many frames in all."""
    rest = frames - (before - 1) * step
    cuts = [0, *sorted(rng.randint(0, rest) for _ in range(before - 1)), rest]
    path = Timeline(0.0)
    for screen, (begin, end) in enumerate(pairwise(cuts)):
        path.move(screen, step if screen else 0).hold(end - begin)
    return path


def _away(rng: random.Random, path: Timeline, home: int, trip: _Trip, waiting: int) -> None:
    """Leave A at screen ``home`` and come back; ``waiting`` frames go into stops and turns on the way."""
    stops = list(range(1, trip.away + 1))
    while waiting >= 2 * trip.step + 2 and len(stops) < 4 * trip.away and rng.random() < 0.5:
        turn = stops[-1] - 1 if stops[-1] > 1 and rng.random() < 0.7 else min(stops[-1] + 1, trip.away + 1, MOST_AWAY)
        if turn == stops[-1]:
            break
        stops += [turn, stops[-1]]
        waiting -= 2 * trip.step
    stops += list(range(stops[-1] - 1, 0, -1))
    cuts = [0, *sorted(round(waiting * rng.random()) for _ in stops[1:]), waiting]
    for stop, (begin, end) in zip(stops, pairwise(cuts)):
        path.move(home + stop, trip.step).hold(end - begin)
    path.move(home, trip.step)
