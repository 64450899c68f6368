"""The judge of what comes back: right on the truth, on damaged truth and on impostors, by luck on shuffled pairs."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from sparse_forcing.errors import ConfigError, VideoError
from sparse_forcing.eval.scene_checker.world_judge import (
    ASPECTS,
    chance_level,
    compare,
    ground_truth_accuracy,
    judge_clip,
    main,
    shares,
)
from sparse_forcing.eval.scene_checker.world_sight import see_return
from sparse_forcing.scenes.worlds.batch import sample_worlds
from sparse_forcing.scenes.worlds.config import GROUNDS, KINDS, WorldConfig
from sparse_forcing.scenes.worlds.draw import render_world
from sparse_forcing.scenes.worlds.identities import draw_identities


def _worlds(kind: str, count: int, **settings):
    batch = sample_worlds(kind, count, 21, WorldConfig(split="all", **settings))
    return [(world, returns[-1]) for world, returns in zip(batch.worlds, batch.returns)]


def _clip(world, entry, side: int = 64, **options) -> torch.Tensor:
    return render_world(world, side, frames=range(*entry.frames), **options).movedim(1, -1) * 0.5 + 0.5


def _degraded(clip: torch.Tensor) -> torch.Tensor:
    """Blurred by a pixel, noisy, and a little too dark."""
    blurred = torch.nn.functional.avg_pool2d(clip.movedim(-1, 1), 3, 1, 1, count_include_pad=False).movedim(1, -1)
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    return (blurred + 0.02 * noise - 0.03).clamp(0, 1)


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_is_right(kind: str, ground: str) -> None:
    found = ground_truth_accuracy(kind, ground, 8, side=64, seed=1)
    assert {name: found[name] for name in (*ASPECTS, "all")} == dict.fromkeys((*ASPECTS, "all"), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_is_right_on_many(kind: str, ground: str) -> None:
    assert ground_truth_accuracy(kind, ground, 60, side=64, seed=2)["all"] >= 0.99
    assert ground_truth_accuracy(kind, ground, 30, side=64, seed=3, frame_noise=10.0)["all"] >= 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_an_impostor_is_named_for_what_it_is(kind: str) -> None:
    """Nothing of the true looks may help: an object of other looks at the same place is what is seen."""
    rng, verdicts, true = random.Random(0), [], []
    for world, entry in _worlds(kind, 20):
        sizes = ("small",) if kind == "swaps" else ("small", "medium")  # a larger one may leave the screen
        (looks,) = draw_identities(rng, "all", 1, returning=(), sizes=sizes)
        items = [replace(item, identity=looks) if n == entry.item else item for n, item in enumerate(world.items)]
        sighting = see_return(_clip(replace(world, items=tuple(items)), entry), world, entry, start=entry.frames[0])
        wanted = replace(entry, colour=looks.colour, shape=looks.shape, size=looks.size)
        verdicts.append(compare(sighting, wanted))
        true.append(compare(sighting, entry))
    assert shares(verdicts)["all"] >= 0.95
    assert shares(true)["all"] <= 0.1


def test_damaged_truth_is_mostly_right() -> None:
    for ground in GROUNDS:
        verdicts = [
            compare(see_return(_degraded(_clip(world, entry)), world, entry, start=entry.frames[0]), entry)
            for world, entry in _worlds("revisit", 6, grounds=(ground,))
        ]
        assert shares(verdicts)["all"] > 0.9


def test_an_empty_ground_shows_nothing() -> None:
    for kind in KINDS:
        for world, entry in _worlds(kind, 6, frame_noise=6.0):
            noise = 0.02 * torch.randn(64, 64, 3, generator=torch.Generator().manual_seed(0))
            clip = (_clip(world, entry, objects=False) + noise).clamp(0, 1)
            sighting = see_return(clip, world, entry, start=entry.frames[0])
            assert (sighting.colour, sighting.shape, sighting.size) == (None, None, None)
            assert sighting.rmse > 5


def test_chance_is_what_shuffled_pairs_get() -> None:
    sightings, entries = [], []
    for kind in ("revisit", "reappear", "parade"):
        for world, entry in _worlds(kind, 24, grounds=("smooth",)):
            sightings.append(see_return(_clip(world, entry), world, entry, start=entry.frames[0]))
            entries.append(entry)
    found = chance_level(sightings, entries)
    assert found["colour"] == pytest.approx(1 / 8, abs=0.025)
    assert found["shape"] == pytest.approx(1 / 5, abs=0.03)
    assert found["size"] == pytest.approx(1 / 3, abs=0.04)
    assert found["all"] < 0.03


@pytest.mark.parametrize("side", [48, 63, 96])
def test_other_sides_are_judged_alike(side: int) -> None:
    verdicts = [
        compare(see_return(_clip(world, entry, side), world, entry, start=entry.frames[0]), entry)
        for kind in KINDS
        for world, entry in _worlds(kind, 5)
    ]
    assert shares(verdicts)["all"] == 1.0


def test_pixel_error_is_that_of_the_returning_view() -> None:
    world, entry = _worlds("revisit", 1)[0]
    clip = _clip(world, entry)
    exact = see_return(clip, world, entry, start=entry.frames[0])
    assert exact.rmse < 1e-3
    assert exact.psnr > 100
    off = see_return(clip * 0.9 + 0.05, world, entry, start=entry.frames[0])
    rmse = float((clip * 0.1 - 0.05).square().mean().sqrt()) * 255
    assert off.rmse == pytest.approx(rmse, rel=0.1)
    assert off.psnr == pytest.approx(20 * torch.tensor(255 / off.rmse).log10().item(), abs=1e-3)


def test_every_return_of_a_clip_is_judged_and_bytes_do_as_well() -> None:
    batch = sample_worlds("revisit", 6, 2)
    for world, returns in zip(batch.worlds, batch.returns):
        clip = ((render_world(world, 64) + 1) * 127.5).round().byte().movedim(1, -1)
        found = judge_clip(clip, world)
        assert [entry for entry, _, _ in found] == list(returns)
        assert all(verdict.all for entry, _, verdict in found if entry.frames[1] - entry.frames[0] > 2)
        begin = returns[-1].frames[0] + 1
        assert [entry for entry, _, _ in judge_clip(clip[begin:], world, start=begin)][-1] == returns[-1]


def test_clips_that_cannot_be_judged_are_refused() -> None:
    world, entry = _worlds("parade", 1)[0]
    with pytest.raises(ConfigError, match="outside the clip, which has frames 0 to 3"):
        see_return(torch.zeros(4, 8, 8, 3), world, entry)
    with pytest.raises(VideoError, match="expected"):
        see_return(torch.zeros(80, 3, 8, 8), world, entry)
    with pytest.raises(VideoError, match="expected"):
        see_return(torch.zeros(80, 8, 9, 3), world, entry)


def test_the_command_prints_accuracy_and_chance(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    main(["--clips", "2", "--side", "48"])
    report = json.loads(capsys.readouterr().out)
    assert len(report) == len(KINDS) * len(GROUNDS)
    assert {"all", "chance_all", "chance_colour"} <= set(report["revisit, noisy"])
