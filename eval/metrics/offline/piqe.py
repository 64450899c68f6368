"""PIQE, a no-reference picture quality index (Venkatanath et al., "Blind image quality evaluation using perception
based features", NCC 2015), written from the paper's equations.

A frame is cut into 16x16 blocks. Blocks with enough local contrast are active; an active block is impaired when a
stretch of its border has almost no contrast (blocking, blur) or when its middle is as rough as its surround (noise).
Index = 100 (sum of impairments + 1) / (active blocks + 1), lower is better; the metric reports 1 - index / 100.
"""

from __future__ import annotations

import cv2
import numpy as np
from einops import rearrange

from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View

BLOCK = 16
SEGMENT = 6
ACTIVE = 0.1  # variance of normalised luma that makes a block active
FLAT = 0.1  # standard deviation below which a border segment is impaired
WINDOW, SIGMA = 7, 7 / 6


def normalize_luma(frame: np.ndarray) -> np.ndarray:
    """Mean-subtracted, contrast-normalised luma [H, W] of a uint8 frame."""
    luma = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)
    mean = cv2.GaussianBlur(luma, (WINDOW, WINDOW), SIGMA, borderType=cv2.BORDER_REPLICATE)
    square = cv2.GaussianBlur(luma * luma, (WINDOW, WINDOW), SIGMA, borderType=cv2.BORDER_REPLICATE)
    return (luma - mean) / (np.sqrt(np.abs(square - mean * mean)) + 1.0)


def piqe_index(frame: np.ndarray) -> float:
    """PIQE of a uint8 RGB frame: 0 (good) .. 100 (bad); NaN for a picture so plain that no block is active."""
    high, wide = -frame.shape[0] % BLOCK, -frame.shape[1] % BLOCK
    padded = np.pad(frame, ((0, high), (0, wide), (0, 0)), mode="edge")
    picture = normalize_luma(padded)
    blocks = rearrange(picture, "(rows p) (columns q) -> (rows columns) p q", p=BLOCK, q=BLOCK)
    variance = blocks.var(axis=(1, 2), ddof=1)
    active = variance > ACTIVE
    if not active.any():
        return float("nan")
    blocks, variance = blocks[active], variance[active]
    flat, noisy = _has_flat_border(blocks), _is_noisy(blocks)
    impairment = flat * (1.0 - variance) + noisy * variance
    return float(100.0 * (impairment.sum() + 1.0) / (len(blocks) + 1.0))


def _has_flat_border(blocks: np.ndarray) -> np.ndarray:
    edges = np.stack([blocks[:, 0], blocks[:, -1], blocks[:, :, 0], blocks[:, :, -1]], axis=1)
    segments = np.lib.stride_tricks.sliding_window_view(edges, SEGMENT, axis=2)
    return (segments.std(axis=-1, ddof=1) < FLAT).any(axis=(1, 2))


def _is_noisy(blocks: np.ndarray) -> np.ndarray:
    middle = slice(BLOCK // 2 - 1, BLOCK // 2 + 1)
    spread = blocks.std(axis=(1, 2), ddof=1)
    center = blocks[:, :, middle].std(axis=(1, 2), ddof=1)
    surround = np.delete(blocks, [middle.start, middle.start + 1], axis=2).std(axis=(1, 2), ddof=1)
    ratio = center / np.maximum(surround, 1e-6)
    beta = np.abs(spread - ratio) / np.maximum(spread, ratio)
    return spread > 2.0 * beta


@metric("picture_quality", suites=("offline", "drift"))
def picture_quality(view: View, resources: Resources) -> Measurement:
    """No-reference picture quality, 1 - PIQE / 100."""
    curve = view.per_frame("piqe", lambda frames: np.array([piqe_index(frame) for frame in frames]))
    curve = curve[~np.isnan(curve)]
    if len(curve) == 0:
        return Measurement(value=None, details={"reason": "no textured block"})
    return Measurement(value=float(1.0 - curve.mean() / 100.0), count=len(curve))
