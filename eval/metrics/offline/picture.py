"""What a frame looks like, in numbers: brightness, contrast, saturation, detail. Neither direction is better in itself.

Brightness and contrast are mean and standard deviation of luma (BT.601), saturation the mean S of HSV, detail the mean
absolute four-neighbour Laplacian of luma; all as shares of 255. Over a long video they show fading and over-exposure.
"""

from __future__ import annotations

import cv2
import numpy as np

from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View

NAMES = ("brightness", "contrast", "saturation", "detail")


def picture_statistics(frames: np.ndarray) -> np.ndarray:
    """[F, 4] in the order of NAMES, each a share of 255."""
    rows = []
    for frame in frames:
        luma = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)
        saturation = cv2.cvtColor(frame, cv2.COLOR_RGB2HSV)[..., 1].mean()
        detail = np.abs(cv2.Laplacian(luma, cv2.CV_32F, ksize=1)).mean()
        rows.append([luma.mean(), luma.std(), saturation, detail])
    return np.array(rows, dtype=np.float64) / 255.0


def _measure(view: View, name: str) -> Measurement:
    column = view.per_frame("picture", picture_statistics)[:, NAMES.index(name)]
    return Measurement(value=float(column.mean()), count=len(column))


@metric("brightness", suites=("offline", "drift"), higher_is_better=None)
def brightness(view: View, resources: Resources) -> Measurement:
    """Mean luma, 0..1."""
    return _measure(view, "brightness")


@metric("contrast", suites=("offline", "drift"), higher_is_better=None)
def contrast(view: View, resources: Resources) -> Measurement:
    """Standard deviation of luma, as a share of full scale."""
    return _measure(view, "contrast")


@metric("saturation", suites=("offline", "drift"), higher_is_better=None)
def saturation(view: View, resources: Resources) -> Measurement:
    """Mean HSV saturation, 0..1."""
    return _measure(view, "saturation")


@metric("detail", suites=("offline", "drift"), higher_is_better=None)
def detail(view: View, resources: Resources) -> Measurement:
    """Mean absolute Laplacian of luma, as a share of full scale: falls with blur, rises with noise."""
    return _measure(view, "detail")


@metric("color_stability", suites=("offline", "drift"), min_frames=2)
def color_stability(view: View, resources: Resources) -> Measurement:
    """1 - distance of each frame's mean and spread of colour from the first frame's (CIELAB, per 100)."""

    def colors(frames: np.ndarray) -> np.ndarray:
        rows = []
        for frame in frames:  # one at a time: floats of a frame are four times its bytes
            pixels = cv2.cvtColor(frame.astype(np.float32) / 255.0, cv2.COLOR_RGB2LAB).reshape(-1, 3)
            rows.append(np.concatenate([pixels.mean(axis=0), pixels.std(axis=0)]))
        return np.array(rows)

    rows = view.per_frame("lab", colors)
    distance = np.linalg.norm(rows[1:] - rows[0], axis=1) / 100.0
    return Measurement(value=float(1.0 - distance.mean()), count=len(distance))
