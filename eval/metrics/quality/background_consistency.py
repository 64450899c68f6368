"""Background consistency: cosine of CLIP ViT-B/32 features with the previous and the first frame."""

from __future__ import annotations

import numpy as np

from sparse_forcing.eval.measuring.features import consistency, network_features
from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View
from sparse_forcing.eval.vbench.transforms import clip_input


def background_features(view: View, resources: Resources) -> np.ndarray:
    """CLIP ViT-B/32 image features [F, 512]."""
    return network_features(view, resources, "clip_b32", clip_input, lambda clip, images: clip.encode_image(images))


@metric(
    "background_consistency", suites=("vbench", "vbench-long", "drift"), needs=("clip_b32",), min_frames=2, pooled=True
)
def background_consistency(view: View, resources: Resources) -> Measurement:
    """VBench background consistency (CLIP ViT-B/32)."""
    return consistency(background_features(view, resources))
