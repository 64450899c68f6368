"""Suite recall: what a manifest says returns, against its first sight."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_forcing.cli import main
from sparse_forcing.errors import ConfigError, MeasurementError
from sparse_forcing.eval.evaluate import EvaluateConfig, evaluate
from sparse_forcing.eval.measuring.frames import ArraySource
from sparse_forcing.eval.measuring.manifest import Entry
from sparse_forcing.eval.measuring.registry import Measurement, suite_metrics
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.returns import MOST_FRAMES, Sight, parse_returns, write_returns
from sparse_forcing.eval.measuring.view import Clip
from sparse_forcing.eval.metrics.recall import crop, similarity_at_return
from sparse_forcing.media.video import write_video

RED, BLUE = (200, 30, 30), (30, 30, 200)


def scene(*colours: tuple[int, int, int], frames: int = 4) -> np.ndarray:
    """uint8 [len(colours) * frames, 64, 64, 3]: grey with a square at the left, of one colour after the other."""
    pixels = np.full((len(colours) * frames, 64, 64, 3), 128, np.uint8)
    for number, colour in enumerate(colours):
        pixels[number * frames : (number + 1) * frames, 16:48, 4:28] = colour
    return pixels


def measure(name: str, frames: np.ndarray, returns: list, resources: Resources | None = None) -> Measurement:
    entry = Entry(video=Path("clip.mp4"), returns=parse_returns(returns))
    clip = Clip(source=ArraySource(frames), fps=8, entry=entry)
    (metric,) = suite_metrics("recall", (name,))
    return metric.compute(clip.whole(), resources or Resources())


def test_what_returns_as_it_was_is_told_from_what_returns_otherwise() -> None:
    returns = [{"first": [0, 4], "again": [8, 12]}]
    same, other = scene(RED, BLUE, RED), scene(RED, BLUE, BLUE)
    assert measure("return_similarity", same, returns).value == pytest.approx(1)
    assert measure("return_similarity", other, returns).value < 0.95
    assert measure("return_gain", same, returns).value > 0.05
    assert measure("return_gain", other, returns).value == pytest.approx(0, abs=1e-6)


def test_only_what_is_inside_the_boxes_counts() -> None:
    frames = scene(RED, BLUE, RED)
    frames[8:, :, 32:] = (250, 250, 0)  # what stands beside it changed
    boxes = {"first_box": [0.0, 0.2, 0.5, 0.8], "again_box": [[0.0, 0.2, 0.5, 0.8]] * 4}
    pair = {"first": [0, 4], "again": [8, 12]}
    assert measure("return_similarity", frames, [pair | boxes]).value == pytest.approx(1)
    assert measure("return_similarity", frames, [pair]).value < 0.99


def test_a_return_is_compared_with_the_most_similar_frame_of_the_first_sight() -> None:
    first, again = np.array([[1.0, 0], [0, 1]]), np.array([[0.0, 2], [1, 1]])
    assert similarity_at_return(first, again) == pytest.approx((1 + 2**-0.5) / 2)


def test_each_return_of_a_video_weighs_the_same_and_what_never_left_has_no_gain() -> None:
    frames = scene(RED, BLUE, RED, BLUE)
    near, far = {"first": [0, 4], "again": [4, 8]}, {"first": [0, 4], "again": [8, 12]}
    both = measure("return_similarity", frames, [near, far])
    assert both.count == 2
    assert both.value == pytest.approx(np.mean(both.details["returns"]))
    assert measure("return_gain", frames, [near]).value is None
    assert measure("return_gain", frames, [near, far]).count == 1


def test_dino_sees_the_crops() -> None:
    class MeanColour(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3))

    resources = Resources(networks={"dino": MeanColour()})
    returns = [
        {"first": [0, 4], "again": [8, 12], "first_box": [0.1, 0.3, 0.4, 0.7], "again_box": [0.1, 0.3, 0.4, 0.7]}
    ]
    assert measure("dino_return_similarity", scene(RED, BLUE, RED), returns, resources).value == pytest.approx(1)
    assert measure("dino_return_gain", scene(RED, BLUE, RED), returns, resources).value > 0.5
    assert measure("dino_return_similarity", scene(RED, BLUE, BLUE), returns, resources).value < 0.5


@pytest.mark.parametrize(
    ("box", "shape"),
    [((0, 0, 1, 1), (10, 20, 3)), ((0.5, 0.5, 0.51, 0.51), (1, 1, 3)), ((-1, -1, 0.26, 9), (10, 6, 3))],
)
def test_a_crop_holds_every_pixel_that_its_box_touches(box, shape) -> None:
    assert crop(np.zeros((10, 20, 3), np.uint8), box).shape == shape


def test_long_ranges_are_looked_at_evenly() -> None:
    picked = [frame for frame, _ in Sight(10, 10 + 8 * MOST_FRAMES).pick()]
    assert picked == list(range(10, 10 + 8 * MOST_FRAMES, 8))
    assert [frame for frame, _ in Sight(3, 5).pick()] == [3, 4]


def test_returns_are_written_as_they_are_read() -> None:
    rows = [{"first": [0, 2], "again": [5, 6], "first_box": [[0.0, 0.0, 0.5, 0.5], [0.1, 0.0, 0.5, 0.5]]}]
    assert write_returns(parse_returns(rows)) == rows


@pytest.mark.parametrize(
    "returns",
    [
        {},
        [3],
        [{"first": [0, 4]}],
        [{"first": [0, 4], "again": [2, 6]}],
        [{"first": [4, 0], "again": [5, 6]}],
        [{"first": [0, True], "again": [5, 6]}],
        [{"first": [0, 4], "again": [5, 6], "box": [0, 0, 1, 1]}],
        [{"first": [0, 4], "again": [5, 6], "again_box": [0.5, 0, 0.5, 1]}],
        [{"first": [0, 4], "again": [5, 6], "again_box": [0, 0, float("nan"), 1]}],
        [{"first": [0, 4], "again": [5, 7], "again_box": [[0, 0, 1, 1]] * 3}],
        [{"first": [0, 4], "again": [5, 6], "again_box": [1.5, 0, 2, 1]}],
    ],
)
def test_returns_that_mean_nothing_are_refused(returns) -> None:
    with pytest.raises(ConfigError, match="returns"):
        parse_returns(returns)


def test_a_return_beyond_the_end_costs_its_value_alone() -> None:
    with pytest.raises(MeasurementError, match="has 12 frames"):
        measure("return_similarity", scene(RED, BLUE, RED), [{"first": [0, 4], "again": [8, 13]}])


def test_worlds_are_judged_from_their_own_manifest_and_changed_returns_are_measured_again(tmp_path: Path) -> None:
    folder = tmp_path / "worlds"
    assert main(["data", "clips", str(folder), "--world", "revisit", "--num-clips", "2", "--num-frames", "80"]) == 0
    write_video(folder / "plain.mp4", scene(RED, BLUE), 8)
    manifest = folder / "manifest.jsonl"
    manifest.write_text(manifest.read_text() + json.dumps({"video": "plain.mp4", "prompt": "a square"}) + "\n")
    assert evaluate(EvaluateConfig(target=manifest, suite="recall", output=tmp_path / "out")) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["metrics"]["return_similarity"]["score"] > 0.99
    assert results["metrics"]["return_similarity"]["videos"] == 2
    assert results["skipped"].keys() == {"dino_return_similarity", "dino_return_gain"}
    assert any("1 videos have no value" in note for note in results["notes"])
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in rows[:2]:
        row["returns"] = [{"first": [0, 8], "again": [40, 48]}]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(EvaluateConfig(target=manifest, suite="recall", output=tmp_path / "out")) == 0
    changed = json.loads((tmp_path / "out" / "results.json").read_text())
    assert changed["metrics"]["return_similarity"]["score"] < 0.99


def test_videos_that_say_nothing_of_returns_are_refused_before_any_work(tmp_path: Path, capsys) -> None:
    write_video(tmp_path / "a.mp4", scene(RED, BLUE), 8)
    assert main(["evaluate", str(tmp_path / "a.mp4"), "--suite", "recall"]) == 2
    assert "does not say what returns" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
