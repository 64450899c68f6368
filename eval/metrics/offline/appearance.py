"""Appearance over time without a network: a descriptor of colours and edges, and how it changes.

The descriptor of a frame joins a soft colour histogram of the whole picture, one of each quadrant, and histograms of
gradient directions in a 4x4 grid (Dalal & Triggs, 2005); square roots make the scalar product the Bhattacharyya
coefficient. It sees colours, layout and shapes, not meaning.
"""

from __future__ import annotations

import cv2
import numpy as np

from sparse_forcing.eval.measuring.features import consistency, neighbour_cosines, unit
from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View

SIDE = 64  # working size
LEVELS = 6  # colour bins per channel
DIRECTIONS = 9
CELLS = 4
COLOR_WEIGHT, LAYOUT_WEIGHT, EDGE_WEIGHT = 0.5, 0.25, 0.25


def describe(frames: np.ndarray) -> np.ndarray:
    """Descriptors [F, D] (float32, unit length) of uint8 frames [F, H, W, 3]."""
    return np.stack([_describe_one(frame) for frame in frames])


def _describe_one(frame: np.ndarray) -> np.ndarray:
    small = cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    half = SIDE // 2
    quadrants = [small[y : y + half, x : x + half] for y in (0, half) for x in (0, half)]
    parts = [
        (COLOR_WEIGHT, _color_histogram(small)),
        (LAYOUT_WEIGHT, np.concatenate([_color_histogram(part) for part in quadrants])),
        (EDGE_WEIGHT, _edge_histogram(small)),
    ]
    return np.concatenate([np.sqrt(weight * part / part.sum()) for weight, part in parts]).astype(np.float32)


def _color_histogram(picture: np.ndarray) -> np.ndarray:
    """Trilinear histogram [LEVELS^3]: a pixel between two bins counts in both, so small shifts move it smoothly."""
    position = picture.reshape(-1, 3).astype(np.float32) * ((LEVELS - 1) / 255.0)
    low = np.minimum(position.astype(np.int64), LEVELS - 2)
    rest = position - low
    histogram = np.zeros(LEVELS**3)
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, rest, 1 - rest), axis=1)
        index = np.ravel_multi_index(tuple((low + corner).T), (LEVELS,) * 3)
        histogram += np.bincount(index, weight, LEVELS**3)
    return histogram


def _edge_histogram(picture: np.ndarray) -> np.ndarray:
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
    dx, dy = cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)
    strength, angle = np.hypot(dx, dy), np.mod(np.arctan2(dy, dx), np.pi)
    direction = np.minimum((angle * (DIRECTIONS / np.pi)).astype(np.int64), DIRECTIONS - 1)
    rows = np.arange(SIDE) * CELLS // SIDE
    cell = rows[:, None] * CELLS + rows[None]
    # The constant keeps an empty picture from dividing by zero and its noise from becoming a pattern.
    return np.bincount((cell * DIRECTIONS + direction).ravel(), strength.ravel(), CELLS**2 * DIRECTIONS) + SIDE


def descriptors(view: View) -> np.ndarray:
    """Descriptors [F, D] of a view."""
    return view.per_frame("descriptor", describe)


@metric("appearance_consistency", suites=("offline", "drift"), min_frames=2)
def appearance_consistency(view: View, resources: Resources) -> Measurement:
    """Cosine of colour-and-edge descriptors with the previous and the first frame."""
    return consistency(descriptors(view))


@metric("shot_continuity", suites=("offline", "drift"), min_frames=2)
def shot_continuity(view: View, resources: Resources) -> Measurement:
    """Smallest cosine of descriptors of neighbouring frames: low where there is a cut."""
    return Measurement(value=float(neighbour_cosines(unit(descriptors(view))).min()))
