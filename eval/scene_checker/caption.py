"""Does a clip show what its caption says?  An automatic judge for the scenes of ``sparse_forcing.scenes``.

Everything is measured from the pixels and compared with the words; two objects are told apart by the colours
the caption gives them.  ``python -m sparse_forcing.eval.scene_checker.caption --clips 2000`` judges freshly drawn
ground truth and prints the share of right verdicts as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from sparse_forcing.errors import SparseForcingError
from sparse_forcing.eval.scene_checker.scene_motion import STEADY_TREND, Motion, classify_motion, resize_left
from sparse_forcing.eval.scene_checker.scene_tracking import (
    FOLDS,
    LEAST_AREA,
    LEAST_CONTRAST,
    Background,
    Track,
    as_rgb,
    measure_background,
    track_objects,
)
from sparse_forcing.scenes.captions import canonical_caption, parse_caption
from sparse_forcing.scenes.render import render
from sparse_forcing.scenes.sample import sample_scenes
from sparse_forcing.scenes.vocabulary import (
    BACKGROUND_RGB,
    CLIP_FRAMES,
    COLOUR_RGB,
    RESIZING,
    SHAPES,
    SIZE_RADIUS,
    Scene,
    SceneObject,
)

ATTRIBUTES = ("background", "colour", "shape", "size", "motion")
LARGEST_COLOUR_DISTANCE = 90.0  # under the distance of two neighbouring palette colours
LEAST_PLAIN = 0.5  # of the pixels near the background colour
LEAST_AGREEING = 0.7  # of the frames with the prompted colour
LEAST_OVERLAP = 0.55  # mean intersection over union with the prompted shape


@dataclass(frozen=True, kw_only=True)
class ObjectResult:
    """Verdicts on one object (None: the caption does not say), what was seen, and how clearly.

    A shape is wrong too when more than that shape is there: another object, or a second copy.
    """

    colour: bool | None
    shape: bool | None
    size: bool | None
    motion: bool | None
    seen: SceneObject
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class CaptionResult:
    """Verdicts on a clip: ``background``, one :class:`ObjectResult` per object, and what was seen."""

    background: bool | None
    objects: tuple[ObjectResult, ...]
    seen: Scene
    scores: dict[str, float]

    def verdict(self, attribute: str) -> bool | None:
        """Whether an attribute of :data:`ATTRIBUTES` is right for every object; None when nothing is said of it."""
        if attribute == "background":
            return self.background
        found = [getattr(item, attribute) for item in self.objects if getattr(item, attribute) is not None]
        return all(found) if found else None

    @property
    def all(self) -> bool:
        """Whether everything the caption says is right."""
        return all(self.verdict(attribute) is not False for attribute in ATTRIBUTES)


def check_clip(video: Tensor, caption: str | Scene, *, start_frame: int = 0) -> CaptionResult:
    """Judge a clip [F, 3, S, S] (uint8, or floating point in [-1, 1]) against a caption or its attributes.

    ``start_frame`` is the clip's first frame within a longer film: what grows may already have grown.  Bounces need
    a whole 5-second clip to show; other motions at time 0 show in 16 frames, most in 8.  Raises VideoError for a
    malformed clip, SparseForcingError for a caption outside the vocabulary or with two objects of one colour.
    """
    scene = parse_caption(caption, required=("colour",)) if isinstance(caption, str) else caption
    colours = [str(item.colour) for item in scene.objects]
    if len(set(colours)) < len(colours):
        raise SparseForcingError(f"caption: two {colours[0]} objects cannot be told apart; give them different colours")
    rgb = as_rgb(video)
    background = measure_background(rgb)
    verdict, name, scores = _judge_background(background, scene.background)
    tracks = track_objects(rgb, background, colours)
    objects = tuple(
        _judge_object(track, background, item, start_frame) for track, item in zip(tracks, scene.objects, strict=True)
    )
    seen = Scene(background=name, objects=tuple(item.seen for item in objects))
    return CaptionResult(background=verdict, objects=objects, seen=seen, scores=scores)


def accuracy(results: Sequence[CaptionResult]) -> dict[str, float]:
    """Share of clips with each attribute right, of those whose caption says something of it, and with all right."""
    shares = {}
    for attribute in ATTRIBUTES:
        verdicts = [found for result in results if (found := result.verdict(attribute)) is not None]
        if verdicts:
            shares[attribute] = sum(verdicts) / len(verdicts)
    return shares | {"all": sum(result.all for result in results) / max(1, len(results))}


def _nearest(rgb: Tensor, palette: dict[str, tuple[int, int, int]]) -> tuple[list[str], Tensor]:
    """The nearest palette colour of each row [N, 3], and its distance [N]."""
    distance = torch.cdist(rgb, torch.tensor(list(palette.values())).float())
    names = list(palette)
    return [names[number] for number in distance.argmin(1).tolist()], distance.min(1).values


def _judge_background(background: Background, wanted: str | None) -> tuple[bool | None, str | None, dict[str, float]]:
    name, distance, agreeing = _vote(background.rgb, BACKGROUND_RGB)
    plain = float(background.plain.median())
    scores = {"background_distance": distance, "background_plain": plain}
    if plain < LEAST_PLAIN or distance > LARGEST_COLOUR_DISTANCE or agreeing < LEAST_AGREEING:
        name = None
    return (None if wanted is None else name == wanted), name, scores


def _vote(rgb: Tensor, palette: dict[str, tuple[int, int, int]]) -> tuple[str | None, float, float]:
    """Nearest name of the median colour of frames [F, 3], its distance, and the share of frames that agree."""
    if not len(rgb):
        return None, float("inf"), 0.0
    (name,), distance = _nearest(rgb.median(0, keepdim=True).values, palette)
    each, _ = _nearest(rgb, palette)
    return name, float(distance), each.count(name) / len(each)


def _judge_object(track: Track, background: Background, wanted: SceneObject, start: int) -> ObjectResult:
    visible = track.visible & ((track.rgb - background.rgb).norm(dim=1) > LEAST_CONTRAST)
    colour, distance, agreeing = _vote(track.rgb[visible], COLOUR_RGB)
    if distance > LARGEST_COLOUR_DISTANCE or agreeing < LEAST_AGREEING:
        colour = None
    shape, radius, overlap = _best_shape(track, visible)
    size = min(SIZE_RADIUS, key=lambda name: abs(log(SIZE_RADIUS[name] / radius))) if shape else None
    motion = classify_motion(track, FOLDS.get(shape or str(wanted.shape)))
    motion_name = motion.name if shape else None
    stray = float(track.stray.median())

    def verdict(seen: str | None, kind: str | None) -> bool | None:
        return None if kind is None else seen == kind

    moves = verdict(motion_name, wanted.motion)
    if wanted.motion in RESIZING:
        moves = shape is not None and _has_resized(motion, str(wanted.motion), size, start, len(track.x))
    return ObjectResult(
        colour=verdict(colour, wanted.colour),
        shape=verdict(shape if stray < LEAST_AREA else None, wanted.shape),
        size=verdict(size, wanted.size),
        motion=moves,
        seen=SceneObject(
            colour=colour, shape=shape, size=None if motion_name in RESIZING else size, motion=motion_name
        ),
        scores={"colour_distance": distance, "radius": radius, "stray": stray}
        | {f"overlap_{name}": float(value) for name, value in zip(SHAPES, overlap, strict=True)}
        | motion.measures,
    )


def _best_shape(track: Track, visible: Tensor) -> tuple[str | None, float, Tensor]:
    """The shape that fits best over the clip (None if none does well), the radius of its size, all mean overlaps."""
    if not bool(visible.any()):
        return None, 0.0, torch.zeros(len(SHAPES))
    overlap = track.overlap[visible].mean(0)
    number = int(overlap.argmax())
    shape = SHAPES[number] if float(overlap[number]) > LEAST_OVERLAP else None
    return shape, float(track.size[visible, number].median()), overlap


def _has_resized(motion: Motion, wanted: str, size: str | None, start: int, frames: int) -> bool:
    """Whether an object in place changes by half of what is left or, where that is little, has its end size."""
    trend, final = (motion.trend, "large") if wanted == "grows" else (-motion.trend, "small")
    left = resize_left(start, frames)
    if not motion.in_place:
        return False
    return trend > left / 2 if start == 0 or left > 2 * STEADY_TREND else size == final and trend > -STEADY_TREND


def _degrade(video: Tensor, generator: torch.Generator) -> Tensor:
    """Mild damage as generated video has it: a Gaussian blur of 0.7 pixels and noise of 0.05 (of a range of 2)."""
    shifts = range(-3, 4)
    weights = (-0.5 * (torch.tensor(shifts) / 0.7).square()).softmax(0)
    for axis in (-1, -2):
        video = sum((weight * video.roll(shift, axis) for weight, shift in zip(weights, shifts)), torch.zeros(()))
    return video + 0.05 * torch.randn(video.shape, generator=generator)


def ground_truth_accuracy(
    clips: int, *, side: int, seed: int, two_objects: bool = False, degraded: bool = False, frames: int = CLIP_FRAMES
) -> dict[str, float]:
    """Share of right verdicts, attribute by attribute, on freshly drawn scenes with their own captions."""
    generator = torch.Generator().manual_seed(seed)
    results, begun = [], time.perf_counter()
    for first in range(0, clips, 20):
        count = min(20, clips - first)
        scenes = sample_scenes(count, generator, two_object_fraction=float(two_objects), split="all")
        videos = render(scenes, frames, side)
        for video, scene in zip(_degrade(videos, generator) if degraded else videos, scenes.scenes(), strict=True):
            results.append(check_clip(video, canonical_caption(scene)))
    return accuracy(results) | {"clips_per_second": clips / (time.perf_counter() - begun)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the checker's accuracy on ground truth as JSON."""
    parser = argparse.ArgumentParser(description="Judge rendered ground truth with the caption checker.")
    parser.add_argument("--clips", type=int, default=200, help="clips per setting")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 128], help="frame sides in pixels")
    options = parser.parse_args(arguments)
    report = {
        f"{side} px, {'two objects' if two else 'one object'}{', blur and noise' if degraded else ''}": {
            name: round(value, 4)
            for name, value in ground_truth_accuracy(
                options.clips, side=side, seed=options.seed, two_objects=two, degraded=degraded
            ).items()
        }
        for side in options.sides
        for two in (False, True)
        for degraded in (False, True)
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
