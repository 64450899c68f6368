"""Motion smoothness: how well every odd frame is predicted by interpolating its two neighbours.

VBench uses AMT-S, whose code and weights are not free to bundle: it comes in as the plugin `interpolator`.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View
from sparse_forcing.eval.vbench.transforms import to_tensor

MULTIPLE = 16


def interpolate_middle(first: np.ndarray, second: np.ndarray, resources: Resources) -> np.ndarray:
    """The frame between two uint8 frames [H, W, 3], truncated to uint8 as VBench does."""
    height, width = first.shape[:2]
    high, wide = -height % MULTIPLE, -width % MULTIPLE
    top, left = high // 2, wide // 2
    pair = F.pad(to_tensor(np.stack([first, second])) / 255.0, [left, wide - left, top, high - top], mode="replicate")

    def call(interpolator: object, images: torch.Tensor) -> torch.Tensor:
        return interpolator(images[:1], images[1:])  # type: ignore[operator]

    middle = resources.features("interpolator", pair, call)[0, :, top : top + height, left : left + width]
    return rearrange((np.clip(middle, 0.0, 1.0) * 255.0).astype(np.uint8), "c h w -> h w c")


def prediction_errors(view: View, resources: Resources) -> np.ndarray:
    """Mean absolute error (0..255) of each odd frame that has both neighbours: [K]."""

    def error(first: np.ndarray, middle: np.ndarray, last: np.ndarray) -> float:
        predicted = interpolate_middle(first, last, resources)
        return float(np.abs(predicted.astype(np.int16) - middle).mean())

    triples = [(middle - 1, middle, middle + 1) for middle in range(1, len(view) - 1, 2)]
    return view.per_group(f"interpolation error:{resources.fingerprint('interpolator')}", error, triples)


@metric("motion_smoothness", suites=("vbench", "vbench-long"), needs=("interpolator",), min_frames=3)
def motion_smoothness(view: View, resources: Resources) -> Measurement:
    """VBench motion smoothness (AMT-S through a plugin): 1 - error of interpolated odd frames."""
    errors = prediction_errors(view, resources)
    return Measurement(value=float((255.0 - errors.mean()) / 255.0), count=len(errors))
