"""Subject consistency: cosine of DINO ViT-B/16 features with the previous and the first frame."""

from __future__ import annotations

import numpy as np
import torch

from sparse_forcing.eval.measuring.features import consistency, network_features
from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View
from sparse_forcing.eval.vbench.transforms import dino_input


def subject_features(view: View, resources: Resources) -> np.ndarray:
    """DINO class-token features [F, 768]."""

    def encode(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        return network(images)

    return network_features(view, resources, "dino", dino_input, encode)


@metric("subject_consistency", suites=("vbench", "vbench-long", "drift"), needs=("dino",), min_frames=2, pooled=True)
def subject_consistency(view: View, resources: Resources) -> Measurement:
    """VBench subject consistency (DINO ViT-B/16)."""
    return consistency(subject_features(view, resources))
