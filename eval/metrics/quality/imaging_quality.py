"""Imaging quality: MUSIQ-SPAQ of every frame, in 0..1 (VBench shows the same number times 100 per video)."""

from __future__ import annotations

import numpy as np
import torch

from sparse_forcing.eval.measuring.features import network_features
from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View
from sparse_forcing.eval.vbench.transforms import musiq_input


def imaging_curve(view: View, resources: Resources) -> np.ndarray:
    """MUSIQ score of each frame / 100: [F]."""

    def one_by_one(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([network(image[None]).reshape(1) for image in images])

    return network_features(view, resources, "musiq", musiq_input, one_by_one)[:, 0] / 100.0


@metric("imaging_quality", suites=("vbench", "vbench-long", "drift"), needs=("musiq",))
def imaging_quality(view: View, resources: Resources) -> Measurement:
    """VBench imaging quality (MUSIQ-SPAQ), 0..1."""
    curve = imaging_curve(view, resources)
    return Measurement(value=float(curve.mean()), count=len(curve))
