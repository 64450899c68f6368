"""Whether a clip shows what its caption says, for captions of the embedded model's domain (shapes that move)."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import torch
from einops import rearrange

from sparse_forcing.errors import SparseForcingError
from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View
from sparse_forcing.eval.scene_checker.caption import ATTRIBUTES, CaptionResult, check_clip
from sparse_forcing.scenes.captions import parse_caption
from sparse_forcing.scenes.vocabulary import Scene

SIDE = 64  # the checker's native picture size; larger whole multiples are averaged down to it
LARGEST_SIDE = 2 * SIDE  # other sizes are shown as they are up to here, and scaled to SIDE above
SEGMENT = 5.0  # seconds in which every motion of the domain shows
PIXELS_AT_ONCE = 1 << 23  # the checker needs some 90 bytes for each; longer clips are judged in equal parts


def shrink(frames: np.ndarray) -> np.ndarray:
    """Square uint8 frames [F, H, H, 3] at a size that the checker knows."""
    side = frames.shape[1]
    if side > SIDE and side % SIDE == 0:
        block = side // SIDE
        return np.stack(
            [np.rint(frame.reshape(SIDE, block, SIDE, block, 3).mean(axis=(1, 3))).astype(np.uint8) for frame in frames]
        )
    if side > LARGEST_SIDE:
        return np.stack([cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for frame in frames])
    return frames


def check_view(view: View) -> list[CaptionResult] | str:
    """The checker's verdicts on the parts of a view (one part unless it is very long), or why it has none."""
    if view.height != view.width:
        return "the picture is not square"
    try:
        scene = parse_caption(view.text or "", required=("colour",))
        side = SIDE if view.height > LARGEST_SIDE or view.height % SIDE == 0 else view.height
        count = -(-len(view) * side * side // PIXELS_AT_ONCE)
        bounds = [round(len(view) * number / count) for number in range(count + 1)]
        return [_check_part(view.part(low, high), scene) for low, high in itertools.pairwise(bounds)]
    except SparseForcingError as error:
        return str(error)


def _check_part(view: View, scene: Scene) -> CaptionResult:
    frames = np.concatenate([shrink(piece) for piece in view.pieces()])
    video = rearrange(torch.from_numpy(np.ascontiguousarray(frames)), "f h w c -> f c h w")
    return check_clip(video, scene, start_frame=view.start)


@metric(
    "caption_match",
    suites=("offline", "drift"),
    needs_text=True,
    min_frames=4,
    segment_seconds=SEGMENT,
    version=2,
)
def caption_match(view: View, resources: Resources) -> Measurement:
    """Share of what the caption says that the clip shows (shape, colour, motion, background; shape-world captions)."""
    parts = check_view(view)
    if isinstance(parts, str):
        return Measurement(value=None, details={"reason": parts[:200]})
    verdicts = {name: [v for part in parts if (v := part.verdict(name)) is not None] for name in ATTRIBUTES}
    known = {name: float(np.mean(found)) for name, found in verdicts.items() if found}
    details = {**{name: share == 1.0 for name, share in known.items()}, "all": all(part.all for part in parts)}
    return Measurement(value=float(np.mean(list(known.values()))) if known else None, details=details)


@metric("caption_all", suites=("offline",), needs_text=True, min_frames=4, version=2)
def caption_all(view: View, resources: Resources) -> Measurement:
    """1 if everything the caption says is shown (shape-world captions)."""
    parts = check_view(view)
    if isinstance(parts, str):
        return Measurement(value=None, details={"reason": parts[:200]})
    return Measurement(value=float(all(part.all for part in parts)))
