"""Temporal flickering against VBench's own way of reading and computing it (OpenCV, BGR, float32)."""

from __future__ import annotations

import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest

from sparse_forcing.eval.measuring.manifest import Entry
from sparse_forcing.eval.measuring.view import open_clip
from sparse_forcing.eval.metrics.quality.flicker import flicker_score
from sparse_forcing.media.video import write_video
from tests.eval.conftest import moving_disc, score


def reference(path: Path) -> float:
    """mean over pairs of cv2.absdiff of BGR frames, as fractions of 255."""
    capture, frames = cv2.VideoCapture(str(path)), []
    while True:
        good, frame = capture.read()
        if not good:
            break
        frames.append(frame)
    differences = [np.mean(cv2.absdiff(a, b)) for a, b in itertools.pairwise(frames)]
    return (255.0 - float(np.mean(differences))) / 255.0


@pytest.mark.parametrize("noise", [0, 12])
def test_an_encoded_clip_scores_as_opencv_reads_it(tmp_path: Path, noise: float) -> None:
    frames = moving_disc(24, speed=3) + np.random.default_rng(0).normal(0, noise, (24, 64, 64, 3))
    write_video(tmp_path / "a.mp4", np.clip(frames, 0, 255).astype(np.uint8), 16)
    clip = open_clip(Entry(video=tmp_path / "a.mp4"), max_frames=100, max_pixels=10**8)
    assert flicker_score(clip.whole()).value == pytest.approx(reference(tmp_path / "a.mp4"), abs=1e-4)


def test_a_known_difference() -> None:
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    frames[1] = 51
    assert score("temporal_flickering", frames) == pytest.approx(1 - 51 / 255)
    assert score("pixel_stability", frames[[0, 0, 0]]) == 1.0
