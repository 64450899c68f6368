"""Features of frames, computed once for a clip piece by piece, and what consistency metrics do with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sparse_forcing.eval.measuring.registry import Measurement
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View

Prepare = Callable[[np.ndarray], torch.Tensor]
Call = Callable[[Any, torch.Tensor], torch.Tensor]


def network_features(view: View, resources: Resources, name: str, prepare: Prepare, call: Call) -> np.ndarray:
    """Per-frame outputs [F, ...] of a network for this view, kept on disk under the network's fingerprint."""

    def compute(frames: np.ndarray) -> np.ndarray:
        return resources.features(name, prepare(frames), call)

    key = f"{name}:{prepare.__name__}:{resources.fingerprint(name)}"
    return view.per_frame(key, compute, keep=True)


def unit(features: np.ndarray) -> np.ndarray:
    """Rows [N, D] scaled to length one, in float64; a zero row stays zero."""
    rows = features.reshape(len(features), -1).astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def neighbour_cosines(rows: np.ndarray) -> np.ndarray:
    """Scalar products [N - 1] of neighbouring rows [N, D], without a second array of that size."""
    return np.einsum("nd,nd->n", rows[1:], rows[:-1])


def consistency_curve(features: np.ndarray) -> np.ndarray:
    """VBench's consistency of features [F, D]: (max(0, cos(f_{i-1}, f_i)) + max(0, cos(f_0, f_i))) / 2 for i >= 1."""
    rows = unit(features)
    previous = neighbour_cosines(rows)
    return (np.maximum(previous, 0) + np.maximum(rows[1:] @ rows[0], 0)) / 2


def consistency(features: np.ndarray) -> Measurement:
    """Mean of `consistency_curve`; a single frame has no consistency."""
    curve = consistency_curve(features)
    return Measurement(value=float(curve.mean()) if len(curve) else None, count=max(1, len(curve)))
