"""Scene: share of frames whose caption contains every word of the scene, from whatever captioner the run has."""

from __future__ import annotations

import numpy as np

from sparse_forcing.errors import MeasurementError
from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View
from sparse_forcing.eval.vbench.semantic import FRAMES
from sparse_forcing.eval.vbench.suites import prompt_index
from sparse_forcing.eval.vbench.transforms import middle_frames


@metric("scene", suites=("vbench", "vbench-long"), needs=("captioner",), needs_text=True, pooled=True)
def scene(view: View, resources: Resources) -> Measurement:
    """Share of frames whose caption names the scene of the prompt."""
    info = prompt_index().get(view.text or "")
    wanted = info.auxiliary.get("scene") if info else None
    if wanted is None:
        return Measurement(value=None, details={"reason": "not a VBench prompt of this dimension"})
    words = wanted["scene"]["scene"].split()
    frames = view.pick(middle_frames(len(view), FRAMES))
    captions = resources.network("captioner").caption(frames)
    if len(captions) != len(frames):
        raise MeasurementError(f"the captioner answered for {len(captions)} of {len(frames)} frames")
    hits = [all(_contains(caption, word, resources.compatible) for word in words) for caption in captions]
    return Measurement(value=float(np.mean(hits)), count=len(hits))


def _contains(caption: str, word: str, anywhere: bool) -> bool:
    """VBench looks for the letters anywhere ("bar" in "barn"); strict mode for the word."""
    return word in caption if anywhere else word.lower() in caption.lower().replace(",", " ").replace(".", " ").split()
