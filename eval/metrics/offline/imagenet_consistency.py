"""Consistency of ImageNet features (EfficientNet-Lite0), where its two optional packages are installed."""

from __future__ import annotations

import numpy as np
import torch

from sparse_forcing.eval.measuring.features import consistency, network_features
from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View
from sparse_forcing.eval.vbench.transforms import resize, to_tensor

SIDE = 128


def efficientnet_input(frames: np.ndarray) -> torch.Tensor:
    """[F, 3, 128, 128], antialiased bilinear, scaled as (x - 127) / 128."""
    return (resize(to_tensor(frames), (SIDE, SIDE), "bilinear", antialias=True) - 127.0) / 128.0


@metric("imagenet_consistency", suites=("offline", "drift"), needs=("efficientnet",), min_frames=2)
def imagenet_consistency(view: View, resources: Resources) -> Measurement:
    """Cosine of EfficientNet-Lite0 features with the previous and the first frame."""

    def pool(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        return network.extract_features(images).mean(dim=(2, 3))  # type: ignore[operator]

    return consistency(network_features(view, resources, "efficientnet", efficientnet_input, pool))
