"""VBench-Long: clip ranges, maps, fusion, and which mean is which."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparse_forcing.eval.long import clip_ranges, fuse, map_score, measure_clips, seconds_for
from sparse_forcing.eval.measuring.registry import all_metrics
from sparse_forcing.eval.measuring.resources import Resources
from tests.eval.conftest import clip_of, moving_disc


def test_clip_ranges() -> None:
    assert clip_ranges(96, 16.0, 2) == [(0, 32), (32, 64), (64, 96)]
    assert clip_ranges(100, 16.0, 2) == [(0, 32), (32, 64), (64, 96), (68, 100)]  # the rest is the LAST 32 frames
    assert clip_ranges(20, 16.0, 2) == [(0, 20)]
    assert clip_ranges(60, 29.97, 2) == [(0, 58), (2, 60)]  # int(29.97) * 2
    with pytest.raises(ValueError, match="no frames"):
        clip_ranges(60, 16.0, 0.5)


def test_a_prompt_takes_the_longest_clip_of_its_dimensions() -> None:
    assert seconds_for("Close up of grapes on a rotating table.") == 10  # overall consistency, aesthetic, imaging
    assert seconds_for("a red bicycle") == 2
    assert seconds_for("no prompt of VBench") == seconds_for(None) == 2


def test_the_map_is_piecewise_linear_and_clamped() -> None:
    assert map_score("background", 0.01) == pytest.approx(0.873691544930448)
    assert map_score("background", 0.015) == pytest.approx((0.873691544930448 + 0.88392356992722) / 2)
    assert map_score("subject", -1.0) == map_score("subject", 0.0)
    assert map_score("subject", 2.0) == map_score("subject", 1.0)


def test_fusion_falls_back_to_the_clips_where_the_map_gives_nothing() -> None:
    assert fuse(0.9, 0.8) == pytest.approx(0.85)
    assert fuse(0.9, None) == fuse(0.9, 0.0) == 0.9


class Colors(torch.nn.Module):
    """Features: the mean colour, and a constant so that cosines are high."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images.mean((2, 3)), torch.ones(len(images), 1)], dim=1)


def test_subject_consistency_fuses_clips_and_their_first_frames() -> None:
    frames = moving_disc(80)
    frames[40:] = 255 - frames[40:]
    metric = all_metrics()["subject_consistency"]
    view = clip_of(frames).whole()
    alone = measure_clips(metric, view, Resources(networks={"dino": Colors()}))
    parts = [
        metric.compute(view.part(a, b), Resources(networks={"dino": Colors()})).value
        for a, b in clip_ranges(80, 16.0, 2)
    ]
    assert alone.count == 3
    assert alone.value == pytest.approx(np.mean(parts))
    both = measure_clips(metric, view, Resources(networks={"dino": Colors(), "dinov2": Colors()}))
    mapped = both.details["clip_to_clip_mapped"]
    assert both.value == pytest.approx(0.5 * np.mean(parts) + 0.5 * mapped)


def test_counts_make_the_pooled_mean_weigh_clips_and_the_video_mean_videos() -> None:
    metric = all_metrics()["temporal_flickering"]
    short = measure_clips(metric, clip_of(moving_disc(32)).whole(), Resources())
    long = measure_clips(metric, clip_of(moving_disc(96)).whole(), Resources())
    assert (short.count, long.count) == (1, 3)
