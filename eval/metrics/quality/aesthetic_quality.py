"""Aesthetic quality: the LAION predictor on CLIP ViT-L/14 features of every frame."""

from __future__ import annotations

import numpy as np
import torch

from sparse_forcing.eval.measuring.features import network_features, unit
from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View
from sparse_forcing.eval.vbench.transforms import clip_input


def aesthetic_curve(view: View, resources: Resources) -> np.ndarray:
    """Predicted rating of each frame divided by 10: [F]."""
    features = network_features(view, resources, "clip_l14", clip_input, lambda clip, x: clip.encode_image(x))
    rows = torch.from_numpy(unit(features)).float()
    return resources.features("aesthetic_head", rows, lambda head, x: head(x))[:, 0] / 10.0


@metric("aesthetic_quality", suites=("vbench", "vbench-long", "drift"), needs=("clip_l14", "aesthetic_head"))
def aesthetic_quality(view: View, resources: Resources) -> Measurement:
    """VBench aesthetic quality (CLIP ViT-L/14 and the LAION head), 0..1."""
    curve = aesthetic_curve(view, resources)
    return Measurement(value=float(curve.mean()), count=len(curve))
