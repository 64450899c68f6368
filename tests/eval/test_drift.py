"""Drift numbers on curves and clips where the answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparse_forcing.eval.drift import (
    DriftSettings,
    analyse,
    chunks,
    opening_similarity,
    repetition,
    slope_per_minute,
    video_drift_error,
    windows,
)
from sparse_forcing.eval.measuring.registry import suite_metrics
from sparse_forcing.eval.measuring.resources import Resources
from tests.eval.conftest import FPS, clip_of, moving_disc

NAMES = ("brightness", "saturation", "contrast", "detail", "pixel_stability", "motion_magnitude")
METRICS = [metric for metric in suite_metrics("drift") if metric.name in NAMES]
LONG = moving_disc(12 * 16)


def analysed(frames: np.ndarray) -> dict:
    numbers, complete = analyse(clip_of(frames).whole(), METRICS, Resources(), DriftSettings())
    assert complete
    return numbers


def test_slope_is_least_squares_per_minute() -> None:
    times = [1.0, 3.0, 5.0, 7.0]
    assert slope_per_minute(times, [2 + 0.5 * t for t in times]) == pytest.approx(30.0)
    assert slope_per_minute([1.0], [2.0]) is None


def test_video_drift_error_by_hand() -> None:
    assert video_drift_error([2.0, 1.0, 4.0]) == pytest.approx(2 * 0.5 + 1 * 1.0)
    expected = math.log(2) * 0.5 + math.log(1) * 1.0
    assert video_drift_error([2.0, 1.0, 4.0], weights="log") == pytest.approx(expected)
    assert video_drift_error([0.0, 1.0]) == math.inf
    early, late = [1.0] + [0.5] + [1.0] * 8, [1.0] * 9 + [0.5]
    assert video_drift_error(early) == pytest.approx(9 * video_drift_error(late))
    for wrong in ({"values": [1.0]}, {"values": [1.0, 2.0], "weights": "square"}):
        with pytest.raises(ValueError, match=r"two chunks|weights"):
            video_drift_error(**wrong)


def test_windows_and_chunks_cover_the_clip() -> None:
    view = clip_of(LONG[:89]).whole()
    assert [(part.start, part.stop) for part in windows(view, 2.0)] == [(0, 32), (32, 64), (64, 89)]
    assert [(part.start, part.stop) for part in windows(view.part(0, 70), 2.0)] == [(0, 32), (32, 64)]
    assert [(part.start, part.stop) for part in windows(view.part(0, 5), 2.0)] == [(0, 5)]
    assert [len(part) for part in chunks(view, 10)] == [8] * 10
    assert chunks(view.part(0, 9), 10) == []


def test_a_steady_clip_does_not_drift() -> None:
    result = analysed(LONG)
    brightness = result["metrics"]["brightness"]
    assert len(brightness["curve"]) == 6
    assert brightness["times"] == [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]
    assert abs(brightness["change"]) < 0.005
    assert brightness["vde"] < 0.5
    assert min(result["opening"]["curve"]) > 0.97


@pytest.mark.parametrize("strength", [pytest.param(0.5, marks=pytest.mark.slow), 1.0])
def test_fading_shows_in_slope_change_ratios_and_vde(strength: float) -> None:
    fade = 1 - 0.6 * strength * np.linspace(0, 1, len(LONG))[:, None, None, None]
    result = analysed((LONG * fade).astype(np.uint8))
    brightness = result["metrics"]["brightness"]
    lost = 0.6 * strength
    # First 5 s against last 5 s of 12 s: the means are 7/12 of the whole fade apart.
    first = 1 - lost * (5 / 12) / 2
    assert brightness["change"] / brightness["first"] == pytest.approx(-lost * 7 / 12 / first, rel=0.02)
    assert brightness["absolute_change"] == -brightness["change"]
    assert brightness["slope"] == pytest.approx(-lost * LONG.mean() / 255 * 60 / 12, rel=0.1)
    assert result["ratios"]["contrast"] < 1 - 0.3 * lost
    assert brightness["vde"] > 5 * analysed(LONG)["metrics"]["brightness"]["vde"]


def test_similarity_to_the_opening_falls_with_distance() -> None:
    ramp = np.linspace(0, 90, len(LONG))[:, None, None, None] * np.array([1.0, 0.0, -0.8])
    view = clip_of(np.clip(LONG + ramp, 0, 255).astype(np.uint8)).whole()
    opening = opening_similarity(view, DriftSettings())
    assert (np.diff(opening["curve"]) < 0).all()
    lags = [opening["lags"][lag] for lag in ("2", "5", "10", "20", "50")]
    assert lags == sorted(lags, reverse=True)


def test_repetition_finds_a_loop_and_nothing_else() -> None:
    loop = np.concatenate([LONG[:64], LONG[:64], LONG[:64]])
    found = repetition(clip_of(loop).whole())
    assert found["repeats"] is True
    assert found["restart_seconds"] == pytest.approx(64 / FPS)
    ramp = np.linspace(0, 60, len(LONG))[:, None, None, None]
    assert repetition(clip_of(np.clip(LONG + ramp, 0, 255).astype(np.uint8)).whole())["repeats"] is False
    assert repetition(clip_of(LONG[[0] * 96]).whole())["repeats"] is None
    assert repetition(clip_of(LONG[:20]).whole())["repeats"] is None


def test_a_clip_shorter_than_a_window_has_a_curve_of_one_point() -> None:
    result = analysed(LONG[:10])
    assert len(result["metrics"]["brightness"]["curve"]) == 1
    assert result["metrics"]["brightness"]["slope"] is None
    assert result["metrics"]["brightness"]["vde"] is not None
    assert result["metrics"]["pixel_stability"]["vde"] is None  # chunks of one frame have no pairs


def test_windows_share_the_work_of_the_whole_clip() -> None:
    clip = clip_of(LONG[:96])
    analyse(clip.whole(), METRICS, Resources(), DriftSettings())
    pairs = [key for key, _ in clip.groups if key == "dis motion"]
    assert len(pairs) == 95
