"""The caption checker: right on ground truth, wrong clips refused, and refused for the right reason."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from sparse_forcing.errors import SparseForcingError, VideoError
from sparse_forcing.eval.scene_checker.caption import (
    ATTRIBUTES,
    CaptionResult,
    accuracy,
    check_clip,
    ground_truth_accuracy,
    main,
)
from sparse_forcing.scenes.captions import canonical_caption
from sparse_forcing.scenes.render import render
from sparse_forcing.scenes.sample import batch_from_scenes, sample_scenes
from sparse_forcing.scenes.vocabulary import COLOURS, MOTIONS, RESIZING, SPINNING, Scene, SceneObject

RED = SceneObject(colour="red", shape="square", size="medium", motion="moves right")


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _scene(**changes: str | None) -> Scene:
    return Scene(background="gray", objects=(replace(RED, **changes),))


@cache
def _clip(scene: Scene, start: int = 0, frames: int = 40, seed: int = 0) -> Tensor:
    return render(batch_from_scenes([scene], _generator(seed)), frames, 64, start=start)[0]


def _wrong(result: CaptionResult) -> list[str]:
    return [name for name in ATTRIBUTES if result.verdict(name) is False]


@pytest.mark.parametrize("two_objects", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("degraded", [False, True], ids=["clean", "degraded"])
def test_ground_truth_is_confirmed(two_objects: bool, degraded: bool):
    shares = ground_truth_accuracy(8 if degraded else 20, side=64, seed=11, two_objects=two_objects, degraded=degraded)
    assert {name: shares[name] for name in (*ATTRIBUTES, "all")} == dict.fromkeys((*ATTRIBUTES, "all"), 1.0)


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("start", [20, 300])
def test_every_segment_of_a_long_film_is_confirmed(motion: str, start: int):
    scene = _scene(motion=motion, size=None if motion in RESIZING else "small")
    assert _wrong(check_clip(_clip(scene, start), canonical_caption(scene), start_frame=start)) == []


def test_seen_attributes_are_the_real_ones_whatever_the_caption_says():
    scenes = sample_scenes(40, _generator(4), split="all")
    names = scenes.scenes()
    wrong = 0
    for video, scene, other in zip(render(scenes, 40, 64), names, names[1:] + names[:1], strict=True):
        result = check_clip(video, canonical_caption(other))
        (item,), (wanted,) = scene.objects, other.objects
        expected = {name: getattr(item, name) == getattr(wanted, name) for name in ("colour", "shape", "motion")}
        expected["background"] = scene.background == other.background
        if item.size is not None and wanted.size is not None:
            expected["size"] = item.size == wanted.size
        wrong += sum(result.verdict(name) != truth for name, truth in expected.items())
        assert result.seen.objects[0] == item
    assert wrong == 0


def test_mismatched_captions_pass_at_about_chance():
    scenes = sample_scenes(40, _generator(5), split="all")
    names = scenes.scenes()
    videos = render(scenes, 40, 64)
    shares = accuracy(
        [
            check_clip(video, canonical_caption(other))
            for video, other in zip(videos, names[1:] + names[:1], strict=True)
        ]
    )
    assert shares["all"] == 0
    for attribute, count in {"background": 6, "colour": 8, "shape": 5, "motion": 13}.items():
        assert shares[attribute] < 1 / count + 4 * (1 / count / 40) ** 0.5


@pytest.mark.parametrize(
    ("motion", "mirrored"),
    [
        ("moves right", "moves left"),
        ("moves up", "moves down"),
        ("orbits clockwise", "orbits counterclockwise"),
        ("spins clockwise", "spins counterclockwise"),
        ("grows", "shrinks"),
    ],
)
def test_a_film_run_backwards_shows_the_opposite(motion: str, mirrored: str):
    scene = _scene(motion=motion, size=None if motion in RESIZING else "medium")
    backwards = _clip(scene).flip(0)
    assert _wrong(check_clip(backwards, scene)) == ["motion"]
    assert check_clip(backwards, scene).seen.objects[0].motion == mirrored


@pytest.mark.parametrize("motion", [motion for motion in MOTIONS if motion != "stays still"])
def test_a_frozen_film_fails_the_motion(motion: str):
    scene = _scene(motion=motion, size=None if motion in RESIZING else "medium")
    frozen = _clip(scene)[7:8].expand(40, -1, -1, -1)
    assert _wrong(check_clip(frozen, scene)) == ["motion"]


@pytest.mark.parametrize("motion", [motion for motion in MOTIONS if motion not in SPINNING])
def test_other_motions_are_not_taken_for_stillness(motion: str):
    scene = _scene(motion=motion, size=None if motion in RESIZING else "medium")
    passes = check_clip(_clip(scene), replace(scene, objects=(replace(scene.objects[0], motion="stays still"),)))
    assert passes.verdict("motion") is (motion == "stays still")


def test_a_recoloured_object_fails_only_the_colour():
    for colour in COLOURS[1:]:
        assert _wrong(check_clip(_clip(_scene(colour=colour)), _scene())) == ["colour"]


def test_a_colour_that_changes_half_way_fails():
    video = torch.cat([_clip(_scene())[:20], _clip(_scene(colour="blue"))[20:]])
    assert "colour" in _wrong(check_clip(video, _scene()))


def test_noise_fails_everything():
    for video in (
        torch.rand(40, 3, 64, 64) * 2 - 1,
        torch.randn(40, 3, 64, 64),
        torch.randn(1, 3, 64, 64).expand(40, -1, -1, -1),
    ):
        assert _wrong(check_clip(video, _scene(motion="stays still"))) == list(ATTRIBUTES)


def test_an_empty_frame_shows_only_its_background():
    blank = _clip(_scene())[:, :, :1, :1].expand(-1, -1, 64, 64) * 0 + 0.004
    result = check_clip(blank, _scene(motion="stays still"))
    assert _wrong(result) == ["colour", "shape", "size", "motion"]
    assert result.seen.objects[0] == SceneObject()


def test_a_second_copy_of_the_object_fails_the_shape():
    still = _scene(motion="stays still", size="small")
    video = _clip(still)
    copy = video.roll(32, -1)
    both = torch.where((copy - video[:, :, :1, :1]).abs().sum(1, keepdim=True) > 0.1, copy, video)
    assert "shape" in _wrong(check_clip(both, still))


def test_an_object_that_vanishes_fails_the_motion():
    video = _clip(_scene()).clone()
    video[25:] = video[:1, :, :1, :1]
    assert "motion" in _wrong(check_clip(video, _scene()))


def test_two_objects_are_matched_by_colour():
    blue = SceneObject(colour="blue", shape="star", size="small", motion="stays still")
    scene = Scene(background="white", objects=(replace(RED, size="small"), blue))
    video = _clip(scene)
    assert check_clip(video, scene).all
    assert check_clip(video, replace(scene, objects=scene.objects[::-1])).all
    swapped = (replace(scene.objects[0], shape="star"), replace(blue, shape="square"))
    result = check_clip(video, replace(scene, objects=swapped))
    assert _wrong(result) == ["shape"]
    assert [item.shape for item in result.objects] == [False, False]
    alone = Scene(background="white", objects=scene.objects[:1])
    assert not check_clip(_clip(alone), scene).all
    assert not check_clip(video, alone).all


def test_attributes_left_open_are_not_judged():
    result = check_clip(_clip(_scene()), "a red square")
    assert [result.verdict(name) for name in ATTRIBUTES] == [None, True, True, None, None]
    assert result.all
    shares = accuracy([result, check_clip(_clip(_scene()), "a red star")])
    assert shares == {"colour": 1.0, "shape": 0.5, "all": 0.5}


def test_uint8_and_floating_point_agree():
    video = _clip(_scene())
    bytes_ = ((video + 1) * 127.5).round().to(torch.uint8)
    assert check_clip(bytes_, _scene()).seen == check_clip(video, _scene()).seen


@pytest.mark.parametrize(
    ("video", "caption", "error"),
    [
        (torch.zeros(40, 64, 64, 3), "a red circle", VideoError),
        (torch.zeros(0, 3, 64, 64), "a red circle", VideoError),
        (torch.zeros(4, 3, 64, 64, dtype=torch.int64), "a red circle", VideoError),
        (torch.full((4, 3, 64, 64), float("nan")), "a red circle", VideoError),
        (torch.zeros(4, 3, 64, 64), "a cat", SparseForcingError),
        (torch.zeros(4, 3, 64, 64), "a circle", SparseForcingError),
        (torch.zeros(4, 3, 64, 64), "a red circle and a red star", SparseForcingError),
    ],
    ids=["order", "empty", "type", "nan", "words", "no colour", "same colour"],
)
def test_bad_input_is_refused_with_one_line(video: Tensor, caption: str, error: type[Exception]):
    with pytest.raises(error) as caught:
        check_clip(video, caption)
    assert "\n" not in str(caught.value)


def test_main_prints_json(capsys: pytest.CaptureFixture[str]):
    main(["--clips", "2", "--sides", "64"])
    report = json.loads(capsys.readouterr().out)
    assert len(report) == 4
    assert all(0 <= shares["all"] <= 1 for shares in report.values())


@pytest.mark.slow
@pytest.mark.parametrize(("side", "clips"), [(64, 200), (128, 50)])
def test_ground_truth_accuracy_reaches_its_targets(side: int, clips: int):
    assert ground_truth_accuracy(clips, side=side, seed=21)["all"] >= 0.99
    assert ground_truth_accuracy(clips * 3 // 5, side=side, seed=22, degraded=True)["all"] >= 0.98
    assert ground_truth_accuracy(clips * 3 // 5, side=side, seed=23, two_objects=True)["all"] >= 0.97
