"""Overall consistency and temporal style: cosine of ViCLIP's video feature (8 middle frames) and prompt feature."""

from __future__ import annotations

import numpy as np

from sparse_forcing.eval.measuring.features import unit
from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View
from sparse_forcing.eval.vbench.transforms import clip_input_uint8, middle_frames

NEEDS = ("viclip", "tokenizer")


def viclip_similarity(view: View, resources: Resources) -> Measurement:
    """Cosine of the view and its prompt; the prompt is cut after 32 tokens."""
    network = resources.network("viclip")
    images = clip_input_uint8(view.pick(middle_frames(len(view), network.frames)))
    video = resources.features("viclip", images[None], lambda viclip, x: viclip.encode_video(x))
    tokens = resources.network("tokenizer")(view.text or "", network.text_encoder.context, truncate=True)
    text = resources.features("viclip", tokens, lambda viclip, x: viclip.encode_text(x))
    return Measurement(value=float(np.dot(unit(video)[0], unit(text)[0])))


@metric(
    "overall_consistency",
    suites=("vbench", "vbench-long", "drift"),
    needs=NEEDS,
    needs_text=True,
    segment_seconds=10.0,
    version=2,
)
def overall_consistency(view: View, resources: Resources) -> Measurement:
    """VBench overall consistency (ViCLIP): video against its whole prompt."""
    return viclip_similarity(view, resources)


@metric("temporal_style", suites=("vbench", "vbench-long"), needs=NEEDS, needs_text=True, version=2)
def temporal_style(view: View, resources: Resources) -> Measurement:
    """VBench temporal style (ViCLIP): video against its whole prompt."""
    return viclip_similarity(view, resources)
