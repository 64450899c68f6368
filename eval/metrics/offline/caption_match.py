"""Whether a clip shows what its caption says, for captions of the embedded model's domain (shapes that move)."""

from __future__ import annotations

import numpy as np
import torch

from sparse_forcing.errors import SparseForcingError
from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View
from sparse_forcing.eval.scene_checker.caption import ATTRIBUTES, CaptionResult, check_clip

SIDE = 64  # the checker's native picture size; larger whole multiples are averaged down to it
SEGMENT = 5.0  # seconds in which every motion of the domain shows


def check_view(view: View) -> CaptionResult | str:
    """The checker's verdicts, or why it has none."""
    frames = view.frames
    height, width = frames.shape[1:3]
    if height != width:
        return "the picture is not square"
    if height > SIDE and height % SIDE == 0:
        block = height // SIDE
        pooled = frames.reshape(len(frames), SIDE, block, SIDE, block, 3).mean(axis=(2, 4))
        frames = np.rint(pooled).astype(np.uint8)
    video = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    try:
        return check_clip(video, view.text or "", start_frame=view.start)
    except SparseForcingError as error:
        return str(error)


@metric(
    "caption_match",
    suites=("offline", "drift"),
    needs_text=True,
    min_frames=4,
    segment_seconds=SEGMENT,
)
def caption_match(view: View, resources: Resources) -> Measurement:
    """Share of what the caption says that the clip shows (shape, colour, motion, background; shape-world captions)."""
    result = check_view(view)
    if isinstance(result, str):
        return Measurement(value=None, details={"reason": result[:200]})
    verdicts = {name: verdict for name in ATTRIBUTES if (verdict := result.verdict(name)) is not None}
    details = {**{name: bool(verdict) for name, verdict in verdicts.items()}, "all": bool(result.all)}
    return Measurement(value=float(np.mean(list(verdicts.values()))) if verdicts else None, details=details)


@metric("caption_all", suites=("offline",), needs_text=True, min_frames=4)
def caption_all(view: View, resources: Resources) -> Measurement:
    """1 if everything the caption says is shown (shape-world captions)."""
    result = check_view(view)
    if isinstance(result, str):
        return Measurement(value=None, details={"reason": result[:200]})
    return Measurement(value=float(result.all))
