"""Which videos and clips count in a score, and which mean is taken, as VBench and VBench-Long do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_forcing.eval.long import measure_clips, measure_static_clips
from sparse_forcing.eval.measuring.registry import all_metrics
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.options import EvaluateConfig
from sparse_forcing.eval.scoring import score_metric, select_rows
from tests.eval.conftest import clip_of, moving_disc

PROMPT = "In a still frame, a stop sign"
FLICKER = all_metrics()["temporal_flickering"]


def config(**options: Any) -> EvaluateConfig:
    return EvaluateConfig(**{"target": Path("v"), "suite": "vbench", "resamples": 10, **options})


def record(index: int, row: dict[str, Any], prompt: str = PROMPT, name: str = "temporal_flickering") -> dict[str, Any]:
    entry = {"count": 1.0, "details": {}, **row}
    return {
        "video": f"{prompt}-{index}.mp4",
        "prompt": prompt,
        "original_prompt": None,
        "index": index,
        "metrics": {name: entry},
    }


def test_static_videos_are_taken_by_number_or_by_name_as_text() -> None:
    records = [record(index, {"value": index / 100, "details": {"static": index != 1}}) for index in range(25)]
    strict = select_rows(FLICKER, records, config(static_filter=True))
    assert [row["index"] for row, _ in strict] == [0, 2, 3, 4, 5]
    by_name = select_rows(FLICKER, records, config(static_filter=True, mode="vbench-compatible"))
    assert [row["index"] for row, _ in by_name] == [0, 10, 11, 12, 13]


@pytest.mark.parametrize("suite", ["vbench", "vbench-long"])
def test_without_the_filter_samples_0_to_4_of_a_vbench_prompt_count(suite: str) -> None:
    records = [record(index, {"value": index / 100}) for index in range(25)]
    assert [row["index"] for row, _ in select_rows(FLICKER, records, config(suite=suite))] == [0, 1, 2, 3, 4]
    own = [record(index, {"value": 0.5}, "a prompt of my own") for index in range(25)]
    assert len(select_rows(FLICKER, own, config(suite=suite))) == 25
    assert len(select_rows(FLICKER, records, config(suite="drift"))) == 25


def test_long_flickering_counts_five_static_clips_a_prompt_and_weighs_videos() -> None:
    values = {
        0: [(0, 0.90), (1, 0.92), (2, 0.94)],
        2: [(0, 0.10)],
        1: [(1, 0.70)],
        10: [(4, 0.80), (5, 0.30)],
    }
    records = [
        record(index, {"value": float(np.mean([value for _, value in clips])), "details": {"static": clips}})
        for index, clips in values.items()
    ]
    options = {"suite": "vbench-long", "static_filter": True}
    by_name = score_metric(FLICKER, records, config(mode="vbench-compatible", **options))
    assert by_name is not None
    assert by_name["score"] == pytest.approx((0.92 + 0.70 + 0.80) / 3)  # three clips of 0, one of 1, one of 10
    strict = score_metric(FLICKER, records, config(**options))
    assert strict is not None
    assert strict["score"] == pytest.approx((0.92 + 0.70 + 0.10) / 3)  # 0, 1, 2
    assert strict["aggregation"] == by_name["aggregation"] == "video mean"


class Flow:
    """A flow of one size that moves only where the picture is bright."""

    def __call__(self, first: torch.Tensor, second: torch.Tensor, iterations: int) -> torch.Tensor:
        return torch.full((1, 2, *first.shape[2:]), 9.0 if float(first.mean()) > 200 else 0.0)


def test_the_filter_of_long_videos_judges_clips() -> None:
    frames = moving_disc(96).repeat(2, axis=1).repeat(2, axis=2) // 2
    frames[32:64] = 255 - frames[32:64] // 8  # the clip in the middle moves
    view = clip_of(frames, PROMPT).whole()
    measured = measure_static_clips(FLICKER, view, Resources(networks={"raft": Flow()}))
    parts = [FLICKER.compute(view.part(at, at + 32), Resources()).value for at in (0, 64)]
    assert measured.details["static"] == [(0, parts[0]), (2, parts[1])]
    assert measured.value == pytest.approx(np.mean(parts))
    moving = measure_static_clips(FLICKER, view.part(32, 64), Resources(networks={"raft": Flow()}))
    assert moving.value is None
    assert moving.details["reason"] == "no clip is static"


def colors(images: torch.Tensor) -> torch.Tensor:
    return images.mean((2, 3))


def test_subject_consistency_of_one_clip_videos_is_pooled_over_frames() -> None:
    metric = all_metrics()["subject_consistency"]
    resources = Resources(networks={"dino": colors, "dinov2": colors})
    short, longer = moving_disc(8), 255 - moving_disc(24, speed=5)
    measured = [measure_clips(metric, clip_of(frames).whole(), resources) for frames in (short, longer)]
    records = [
        record(0, {"value": part.value, "count": part.count, "details": part.details}, f"p{number}", metric.name)
        for number, part in enumerate(measured)
    ]
    options = {"suite": "vbench-long", "mode": "vbench-compatible"}
    score = score_metric(metric, records, config(**options))
    assert score is not None
    assert score["aggregation"] == "frame-pooled"
    assert score["score"] == pytest.approx((7 * measured[0].value + 23 * measured[1].value) / 30, abs=1e-12)
    many = measure_clips(metric, clip_of(moving_disc(70)).whole(), resources)
    records.append(record(0, {"value": many.value, "count": many.count, "details": many.details}, "p", metric.name))
    mixed = score_metric(metric, records, config(**options))
    assert mixed is not None
    assert mixed["aggregation"] == "pooled"
    assert mixed["score"] == pytest.approx((measured[0].value + measured[1].value + 3 * many.value) / 5)
