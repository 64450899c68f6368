"""Worlds as pixels and words: the same whatever they are drawn with, at any size; no prompt tells what to remember."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from sparse_forcing.errors import ConfigError
from sparse_forcing.scenes.captions import caption_words
from sparse_forcing.scenes.captions import vocabulary_words as scene_words
from sparse_forcing.scenes.vocabulary import COLOUR_RGB, COLOURS, SHAPES, SIZES
from sparse_forcing.scenes.worlds.batch import WorldBatch, draw_world, sample_mixture, sample_worlds
from sparse_forcing.scenes.worlds.captions import world_words
from sparse_forcing.scenes.worlds.config import GROUNDS, KINDS, WorldConfig
from sparse_forcing.scenes.worlds.draw import render_world
from sparse_forcing.scenes.worlds.ground import BRIGHTEST, DARKEST, LEVELS_OF_KIND, draw_strip, look
from sparse_forcing.scenes.worlds.record import read_record, write_record


@pytest.mark.parametrize("kind", KINDS)
def test_worlds_are_seeded_and_do_not_depend_on_what_they_are_drawn_with(kind: str) -> None:
    batch = sample_worlds(kind, 6, 7)
    assert sample_worlds(kind, 2, 7, start=3).worlds == batch.worlds[3:5]
    assert sample_worlds(kind, 6, 8).worlds != batch.worlds
    video = batch.render(16)
    assert video.shape == (6, 80, 3, 16, 16)
    assert video.dtype == torch.float32
    assert video.min() >= -1
    assert video.max() <= 1
    assert torch.equal(video[3:5], sample_worlds(kind, 2, 7, start=3).render(16))
    state = torch.get_rng_state()
    assert torch.equal(batch.render(16), video)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ground", GROUNDS)
def test_any_frames_of_a_clip_are_those_of_the_whole(kind: str, ground: str) -> None:
    world = draw_world(kind, 1, 2, WorldConfig(grounds=(ground,), frame_noise=6.0))
    whole = render_world(world, 24)
    assert torch.allclose(render_world(world, 24, frames=range(40, 55)), whole[40:55], atol=1e-6)
    assert torch.allclose(render_world(world, 24, frames=[7, 61, 7]), whole[[7, 61, 7]], atol=1e-6)


@pytest.mark.parametrize("side", [1, 17, 33, 48, 96])
def test_any_side_and_length_can_be_drawn_and_shows_the_same(side: int) -> None:
    for kind in KINDS:
        world = draw_world(kind, 0, 4, WorldConfig(frames=67, grounds=("smooth",)))
        small = render_world(world, side, frames=range(0, 67, 9))
        assert small.shape == (8, 3, side, side)
        if side == 1:
            continue
        large = render_world(world, 4 * side, frames=range(0, 67, 9))
        assert (torch.nn.functional.avg_pool2d(large, 4) - small).abs().mean() < 0.03


@pytest.mark.parametrize("ground", GROUNDS)
def test_grounds_keep_apart_from_object_colours_and_come_back_as_they_were(ground: str) -> None:
    palette = torch.tensor(list(COLOUR_RGB.values())).float()
    for index in range(6):
        world = draw_world("revisit", 3, index, WorldConfig(grounds=(ground,)))
        strip = (draw_strip(world.ground, 32) + 1) * 127.5
        assert torch.equal(strip, (draw_strip(world.ground, 32) + 1) * 127.5)
        typical = strip.flatten(1).T
        assert float(torch.cdist(typical, palette).min(1).values.quantile(0.05)) > 60
        assert DARKEST - 3 * LEVELS_OF_KIND < float(typical.mean()) < BRIGHTEST + 3 * LEVELS_OF_KIND
        # Nothing but the objects tells two frames of one camera position apart.
        again = [frame for frame, place in enumerate(world.camera) if place == world.camera[-1]]
        bare = render_world(world, 32, frames=[again[0], again[-1]], objects=False)
        assert torch.equal(bare[0], bare[1])


def test_places_of_a_strip_can_be_told_apart() -> None:
    for index in range(12):
        world = draw_world("revisit", 9, index, WorldConfig(grounds=("smooth",)))
        low, high = world.ground.span
        places = [low + (high - low) * step / 8 for step in range(9)]
        views = look(world.ground, places, 64)
        difference = (views[:, None] - views[None]).abs().amax((2, 3, 4)) + torch.eye(9)
        assert difference.min() > 0.05


def test_frame_noise_is_new_in_every_frame_and_as_strong_as_asked_for() -> None:
    config = WorldConfig(grounds=("smooth",), frame_noise=8.0)
    noisy, clean = (draw_world("parade", 0, 0, each) for each in (config, WorldConfig(grounds=("smooth",))))
    noise = render_world(noisy, 32) - render_world(clean, 32)
    assert 6 < float(noise.std()) * 127.5 < 9
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(render_world(noisy, 32, objects=False), render_world(clean, 32, objects=False))


def test_prompts_never_name_what_returns() -> None:
    forbidden = {*COLOURS, *SHAPES, *SIZES, "violet", "disk", "hoop", "tiny", "little", "big", "huge"}
    assert not forbidden & set(world_words())
    used: set[str] = set()
    for kind in KINDS:
        batch = sample_worlds(kind, 150, 3)
        assert len(set(batch.captions())) > 20
        texts = [*batch.captions(), *(text for schedule in batch.schedules() for text in schedule.values())]
        used |= {word for text in texts for word in caption_words(text)}
        assert all(len(caption_words(text)) <= 24 for text in texts)
    assert used <= set(world_words())
    assert len(set(world_words()) - used) <= 1
    assert len(world_words()) < 60
    assert len(set(world_words()) - set(scene_words())) < 30


def test_a_mixture_draws_kinds_by_weight_and_every_number_by_itself() -> None:
    weights = {"revisit": 3.0, "parade": 1.0, "swaps": 0.0}
    batch = sample_mixture(weights, range(200), 0)
    assert isinstance(batch, WorldBatch)
    kinds = Counter(world.kind for world in batch.worlds)
    assert set(kinds) == {"revisit", "parade"}
    assert 120 < kinds["revisit"] < 180
    assert sample_mixture(dict(reversed(weights.items())), [199, 5], 0).worlds == (batch.worlds[199], batch.worlds[5])
    for wrong in ({"maze": 1.0}, {"revisit": -1.0}, {"revisit": 0.0}, {}):
        with pytest.raises(ConfigError, match="worlds"):
            sample_mixture(wrong, [0], 0)


def test_a_record_draws_the_same_world_again() -> None:
    import json

    config = WorldConfig(frames=96, gap=(12, 30), grounds=("noisy",), split="heldout")
    for kind in KINDS:
        world = draw_world(kind, 5, 17, config)
        record = json.loads(json.dumps(write_record(world, config)))
        assert read_record(record) == world
        assert len(record["boxes"]) == 96
        (returned,) = record["returns"][-1:]
        assert len(returned["boxes"]) == returned["frames"][1] - returned["frames"][0]
    with pytest.raises(ConfigError, match="not a line of"):
        read_record({"video": "x.mp4"})


def test_frames_that_are_not_there_are_refused() -> None:
    (world,) = sample_worlds("revisit", 1, 0).worlds
    for frames in (range(70, 90), range(0), [-1]):
        with pytest.raises(ConfigError, match="cannot draw"):
            render_world(world, 16, frames=frames)
    with pytest.raises(ConfigError, match="count must be at least 1"):
        sample_worlds("revisit", 0, 0)
    with pytest.raises(ConfigError, match="unknown kind 'maze'"):
        sample_worlds("maze", 1, 0)
