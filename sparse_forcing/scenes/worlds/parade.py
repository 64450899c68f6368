"""Parade: objects appear one after the other in the middle, then a prompt asks for one of them again.

A bar below grows with every object, so that "the second one" can be read off the frames that show it.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from sparse_forcing.errors import ConfigError
from sparse_forcing.scenes.worlds.config import MOST_OBJECTS, WorldConfig
from sparse_forcing.scenes.worlds.identities import draw_identities
from sparse_forcing.scenes.worlds.world import Box, Item, Panel, Plan

SLOT_FRAMES = range(6, 21)  # of one object, the pause after it included
AGAIN = 6  # least frames of the one asked for
MIDDLE = (0.5, 0.46)
BAR = (0.05, 0.92, 0.95, 0.97)
BAR_RGB, LIT_RGB = (0, 0, 0), (235, 235, 235)


class _Slots(NamedTuple):
    """How many objects, which of them is asked for (from 0), frames for each."""

    total: int
    asked: int
    length: int

    @property
    def pause(self) -> int:
        """Frames after an object in which nothing is there."""
        return max(2, self.length // 4)

    @property
    def before(self) -> int:
        """Frames from the first object's first to the asked one's last, end excluded."""
        return (self.asked + 1) * self.length - self.pause

    @property
    def least(self) -> int:
        """The shortest gap: the question comes as soon as all have been there."""
        return self.total * self.length - self.before


def plan_parade(rng: random.Random, config: WorldConfig) -> Plan:
    """The objects, the bar, and when which one is asked for; raises ConfigError where the clip is too short."""
    last = (config.frames - AGAIN) // config.align * config.align  # the latest frame to ask at
    room = last - config.opening_frames
    fitting = [
        slots
        for count in sorted(set(config.objects))
        for slots in (_Slots(count, asked, length) for asked in range(count) for length in SLOT_FRAMES)
        if count * slots.length <= room
    ]
    if not fitting:
        need = config.opening_frames + min(config.objects) * SLOT_FRAMES[0] + AGAIN + config.align - 1
        raise ConfigError(f"worlds: {config.frames} frames are too few for parade; it takes at least {need}")
    least, most = config.gap_range(
        min(slots.least for slots in fitting), max(room - slots.before for slots in fitting), "parade"
    )
    fitting = [slots for slots in fitting if slots.least <= most and room - slots.before >= least]
    if not fitting:
        raise ConfigError(f"worlds: no parade of {config.objects} objects in {config.frames} frames has such a gap")
    count = rng.choice(sorted({slots.total for slots in fitting}))
    asked = rng.choice(sorted({slots.asked for slots in fitting if slots.total == count}))
    slots = rng.choice([slots for slots in fitting if slots[:2] == (count, asked)])
    gap = rng.randint(max(least, slots.least), min(most, room - slots.before))
    earliest = -(-(config.opening_frames + slots.before + gap) // config.align)
    question = rng.randint(earliest, last // config.align) * config.align
    first = question - gap - slots.before
    return _lay_out(rng, config, slots, first, question)


def _lay_out(rng: random.Random, config: WorldConfig, slots: _Slots, first: int, question: int) -> Plan:
    identities = draw_identities(rng, config.split, slots.total, returning=(slots.asked,))
    x, y = ((place,) * config.frames for place in MIDDLE)
    items = []
    for number, identity in enumerate(identities):
        begin = first + number * slots.length
        shown = [begin <= frame < begin + slots.length - slots.pause for frame in range(config.frames)]
        if number == slots.asked:
            shown[question:] = [True] * (config.frames - question)
        items.append(Item(identity=identity, x=x, y=y, shown=tuple(shown)))
    counts = [min(max(0, (frame - first) // slots.length + 1), slots.total) for frame in range(config.frames)]
    panels = [
        Panel(rgb=BAR_RGB, boxes=(BAR,) * config.frames),
        Panel(rgb=LIT_RGB, boxes=tuple(_find_lit(count) for count in counts)),
    ]
    return Plan(items=items, panels=panels, asked=slots.asked, question=question)


def _find_lit(count: int) -> Box:
    left, top, right, bottom = BAR
    return left, top, left + (right - left) * count / MOST_OBJECTS, bottom
