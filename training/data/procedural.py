"""Procedural captioned clips as training batches: every batch is a function of (seed, step), so a resumed run sees
exactly the data an uninterrupted one would have seen. A share of the clips may be worlds in which something returns."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.scenes.captions import caption
from sparse_forcing.scenes.render import render
from sparse_forcing.scenes.sample import SceneBatch, sample_scenes
from sparse_forcing.scenes.vocabulary import CLIP_FRAMES
from sparse_forcing.scenes.worlds.batch import WorldBatch, check_weights, sample_mixture
from sparse_forcing.scenes.worlds.config import WorldConfig


@dataclass(frozen=True)
class ClipBatch:
    """Clips: pixels [B, 3, F, S, S] in [-1, 1], one caption each ("" where it was dropped), the scenes they were drawn
    from and the frame of its scene [B] at which each clip starts."""

    pixels: Tensor
    captions: list[str]
    scenes: SceneBatch
    start: Tensor


def step_seed(seed: int, step: int, stream: int = 0) -> int:
    """A seed per training step and purpose; streams keep data and noise independent."""
    return (seed * 1_000_003 + step) * 16 + stream


def procedural_batch(
    seed: int,
    step: int,
    *,
    batch_size: int,
    num_frames: int,
    size: int,
    two_object_fraction: float,
    caption_dropout: float,
    split: str = "train",
    late_start_fraction: float = 0.0,
    motion_weights: Mapping[str, float] | None = None,
    shape_weights: Mapping[str, float] | None = None,
    device: torch.device | str = "cpu",
) -> ClipBatch:
    """The batch of one step, with varied captions. Clips show the first frames of their scene, except for a share that
    starts at any later moment of its first five seconds; weights as in `sample_scenes`. What is drawn at
    random does not depend on `device`, where the scenes are rendered and stay."""
    generator = torch.Generator().manual_seed(step_seed(seed, step))
    words = random.Random(step_seed(seed, step))
    scenes = sample_scenes(
        batch_size,
        generator,
        two_object_fraction=two_object_fraction,
        split=split,
        motion_weights=motion_weights,
        shape_weights=shape_weights,
    )
    start = torch.randint(max(1, CLIP_FRAMES - num_frames + 1), (batch_size,), generator=generator)
    start *= torch.rand(batch_size, generator=generator) < late_start_fraction
    captions = ["" if words.random() < caption_dropout else caption(scene, words) for scene in scenes.scenes()]
    scenes, start = scenes.to(device), start.to(device)
    video = render(scenes, num_frames, size, start=start)
    return ClipBatch(video.transpose(1, 2), captions, scenes, start)


def check_world_share(worlds: Mapping[str, float] | None, fraction: float) -> None:
    """Raise ConfigError unless kinds of worlds and the share of clips that are worlds go together."""
    if not 0 <= fraction <= 1:
        raise ConfigError(f"world_fraction must lie in [0, 1], got {fraction}")
    if (fraction > 0) != (worlds is not None):
        raise ConfigError("worlds and world_fraction: each has an effect only with the other; give both or neither")
    if worlds is not None:
        check_weights(worlds)


def worlds_in_batch(
    seed: int,
    step: int,
    *,
    batch_size: int,
    fraction: float,
    weights: Mapping[str, float],
    config: WorldConfig,
    caption_dropout: float,
) -> tuple[list[int], WorldBatch | None, list[str]]:
    """Which samples of a step are worlds, the worlds and their captions ("" where dropped); none: [], None, [].

    Each sample is a world with probability `fraction`; its number in the whole training alone decides which.
    """
    chance = random.Random(f"worlds of step {step} of {seed}")
    drawn = [(chance.random() < fraction, chance.random() < caption_dropout) for _ in range(batch_size)]
    places = [place for place, (is_world, _) in enumerate(drawn) if is_world]
    if not places:
        return [], None, []
    worlds = sample_mixture(weights, [step * batch_size + place for place in places], seed, config)
    captions = ["" if drawn[place][1] else text for place, text in zip(places, worlds.captions())]
    return places, worlds, captions
