"""Motion from OpenCV's DIS optical flow (Kroeger et al., arXiv 1603.03590): how much, how smooth, whether frozen.

No weights. Pictures are scaled so that the short side has 128 pixels; displacements are given as a share of it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cv2
import numpy as np

from sparse_forcing.errors import MeasurementError
from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View

SHORT_SIDE = 128
LONG_SIDE = 32 * SHORT_SIDE  # a strip of two rows would grow to millions of pixels
TOP = 0.05
FROZEN = 0.5  # grey levels: below it two frames are the same picture


@lru_cache(maxsize=1)
def _make_estimator() -> Any:
    # OpenCV's type stubs do not know this function.
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)  # type: ignore[attr-defined]


def _scale(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    scale = SHORT_SIDE / min(height, width)
    if max(height, width) * scale > LONG_SIDE:
        raise MeasurementError(f"motion is not measured in pictures as narrow as {width}x{height}")
    size = (max(SHORT_SIDE, round(width * scale)), max(SHORT_SIDE, round(height * scale)))
    return cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR if scale > 1 else cv2.INTER_AREA)


def dense_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Displacement of every pixel of `first` [h, w, 2] at the working size, uint8 RGB in."""
    grey = [cv2.cvtColor(_scale(frame), cv2.COLOR_RGB2GRAY) for frame in (first, second)]
    return _make_estimator().calc(grey[0], grey[1], None)


def fastest_motion(first: np.ndarray, second: np.ndarray) -> float:
    """Mean displacement of the fastest 5 % of pixels, as a share of the short side."""
    if np.array_equal(first, second):
        return 0.0
    magnitude = np.linalg.norm(dense_flow(first, second), axis=-1).ravel()
    count = max(1, int(TOP * magnitude.size))
    return float(np.partition(magnitude, -count)[-count:].mean() / SHORT_SIDE)


def middle_error(first: np.ndarray, middle: np.ndarray, last: np.ndarray) -> float:
    """Mean error (0..255) of predicting a frame from its neighbours moved half way along the flow between them."""
    start, end, target = (_scale(frame).astype(np.float32) for frame in (first, last, middle))
    height, width = target.shape[:2]
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    predicted = np.zeros_like(target)
    for picture, flow in ((start, dense_flow(first, last)), (end, dense_flow(last, first))):
        x, y = columns - flow[..., 0] / 2, rows - flow[..., 1] / 2
        predicted += cv2.remap(picture, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) / 2
    return float(np.abs(predicted - target).mean())


@metric("motion_magnitude", suites=("offline", "drift"), higher_is_better=None, min_frames=2)
def motion_magnitude(view: View, resources: Resources) -> Measurement:
    """Speed of the fastest 5 % of pixels (DIS flow), in picture heights per second."""
    speeds = view.pairs("dis motion", fastest_motion) * view.fps
    return Measurement(value=float(speeds.mean()), count=len(speeds))


@metric("warp_smoothness", suites=("offline", "drift"), min_frames=3)
def warp_smoothness(view: View, resources: Resources) -> Measurement:
    """1 - error of predicting odd frames by moving their neighbours half way (DIS flow)."""
    # Odd in the whole clip, so that windows share the work.
    middles = range(1 + view.start % 2, len(view) - 1, 2)
    errors = view.per_group("warp", middle_error, [(middle - 1, middle, middle + 1) for middle in middles])
    if not len(errors):
        return Measurement(value=None)
    return Measurement(value=1.0 - float(errors.mean()) / 255.0, count=len(errors))


@metric("moving_share", suites=("offline", "drift"), min_frames=2)
def moving_share(view: View, resources: Resources) -> Measurement:
    """Share of consecutive frames that differ at all: 0 for a frozen video."""

    def differs(first: np.ndarray, second: np.ndarray) -> float:
        # The most different of 8x8 regions: a small moving object must not count as frozen.
        change = np.abs(first.astype(np.int16) - second).mean(axis=2).astype(np.float32)
        return float(cv2.resize(change, (8, 8), interpolation=cv2.INTER_AREA).max() > FROZEN)

    moving = view.pairs("differs", differs)
    return Measurement(value=float(moving.mean()), count=len(moving))
