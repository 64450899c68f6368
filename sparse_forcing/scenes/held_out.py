"""Prompts to judge the embedded model by: captions of scenes whose combination of attributes was never trained on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from sparse_forcing.scenes.captions import caption
from sparse_forcing.scenes.sample import sample_scenes
from sparse_forcing.scenes.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    RESIZING,
    SHAPES,
    SIZES,
    Scene,
    has_held_out,
    is_possible,
)

CHANGEABLE = {"background": BACKGROUNDS, "colour": COLOURS, "shape": SHAPES, "size": SIZES, "motion": MOTIONS}


def held_out_prompts(count: int, *, seed: int = 0, objects: int = 1) -> list[str]:
    """`count` captions in varied wording of held-out scenes with one or two objects; more begin with the same."""
    scenes, words = _held_out_scenes(seed, objects), random.Random(seed)
    return [caption(next(scenes), words) for _ in range(count)]


class PromptChange(NamedTuple):
    """Captions, each in a wording of its own, of a scene and of the same with one attribute changed."""

    before: str
    after: str
    attribute: str


def changing_prompts(count: int, *, seed: int = 0) -> list[PromptChange]:
    """`count` scenes of one object in which an attribute, each in turn, takes another value; both combinations are held
    out. Captions say every size there is; more changes begin with the same."""
    scenes, words = _held_out_scenes(seed, 1), random.Random(seed)
    changes: list[PromptChange] = []
    while len(changes) < count:
        attribute, scene = tuple(CHANGEABLE)[len(changes) % len(CHANGEABLE)], next(scenes)
        others = [_change(scene, attribute, value) for value in CHANGEABLE[attribute]]
        others = [other for other in others if other != scene and has_held_out(other) and _can_become(scene, other)]
        if others:
            before, after = (caption(each, words, size_dropout=0) for each in (scene, words.choice(others)))
            changes.append(PromptChange(before, after, attribute))
    return changes


def _held_out_scenes(seed: int, objects: int) -> Iterator[Scene]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from sample_scenes(1, generator, two_object_fraction=objects - 1.0, split="heldout").scenes()


def _change(scene: Scene, attribute: str, value: str) -> Scene:
    """The scene of one object with another value of an attribute; what grows or shrinks has no size."""
    if attribute == "background":
        return replace(scene, background=value)
    (item,) = scene.objects
    item = replace(item, **{attribute: value})
    if item.motion in RESIZING:
        item = replace(item, size=None)
    return replace(scene, objects=(item,))


def _can_become(scene: Scene, other: Scene) -> bool:
    """Whether a video can go on from one to the other: only what is small can begin to grow from small to large."""
    (old,), (new,) = scene.objects, other.objects
    begins = {"grows": "small", "shrinks": "large"}
    if new.motion != old.motion and new.motion in begins and old.size != begins[new.motion]:
        return False
    return is_possible(str(new.shape), str(new.motion))
