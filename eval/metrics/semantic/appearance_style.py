"""Appearance style: similarity of CLIP ViT-B/32 between every frame and the style words of the prompt.

VBench takes CLIP's logit and divides it by 100: the cosine, times what the checkpoint's `logit_scale` is off 100.
"""

from __future__ import annotations

from sparse_forcing.eval.measuring.features import network_features, unit
from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View
from sparse_forcing.eval.vbench.suites import prompt_index
from sparse_forcing.eval.vbench.transforms import clip_input_pil

LOGITS_PER_COSINE = 100.0


@metric(
    "appearance_style",
    suites=("vbench", "vbench-long"),
    needs=("clip_b32", "tokenizer"),
    needs_text=True,
    pooled=True,
    version=2,
)
def appearance_style(view: View, resources: Resources) -> Measurement:
    """VBench appearance style (CLIP ViT-B/32): frames against the style named in the prompt."""
    info = prompt_index().get(view.text or "")
    style = info.auxiliary.get("appearance_style", {}).get("appearance_style") if info else None
    if style is None:
        return Measurement(value=None, details={"reason": "not one of VBench's style prompts"})
    frames = network_features(view, resources, "clip_b32", clip_input_pil, lambda clip, x: clip.encode_image(x))
    network = resources.network("clip_b32")
    tokens = resources.network("tokenizer")(style, network.context, truncate=False)
    text = resources.features("clip_b32", tokens, lambda clip, x: clip.encode_text(x))
    similarities = unit(frames) @ unit(text)[0] * (float(network.logit_scale.exp()) / LOGITS_PER_COSINE)
    return Measurement(value=float(similarities.mean()), count=len(similarities))
