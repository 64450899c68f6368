"""Temporal flickering: how much consecutive frames differ, pixel by pixel (VBench, section "temporal flickering")."""

from __future__ import annotations

import numpy as np

from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View


def mean_absolute_difference(first: np.ndarray, second: np.ndarray) -> float:
    """Mean |a - b| over pixels and channels of two uint8 frames [H, W, 3], in 0..255."""
    return float(np.abs(first.astype(np.int16) - second).mean())


def flicker_score(view: View) -> Measurement:
    """(255 - mean over consecutive pairs of the mean absolute difference) / 255; 1 for a still picture."""
    differences = view.pairs("absolute difference", mean_absolute_difference)
    return Measurement(value=float((255.0 - differences.mean()) / 255.0), count=len(differences))


@metric("pixel_stability", suites=("offline", "drift"), min_frames=2)
def pixel_stability(view: View, resources: Resources) -> Measurement:
    """1 - mean absolute difference of consecutive frames."""
    return flicker_score(view)


@metric("temporal_flickering", suites=("vbench", "vbench-long"), min_frames=2)
def temporal_flickering(view: View, resources: Resources) -> Measurement:
    """VBench temporal flickering: 1 - mean absolute difference of consecutive frames."""
    return flicker_score(view)
