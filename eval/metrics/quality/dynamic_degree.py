"""Dynamic degree and the static filter: how far RAFT sees the fastest pixels move.

Score of a pair: the mean of the largest 5 % of flow magnitudes, in pixels, over the padded picture as VBench does.
"""

from __future__ import annotations

import numpy as np

from sparse_forcing.errors import MeasurementError
from sparse_forcing.eval.measuring.registry import Measurement, metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View
from sparse_forcing.eval.vbench.networks.raft import SMALLEST, pad_to_stride
from sparse_forcing.eval.vbench.transforms import to_tensor

ITERATIONS = 20
SAMPLE_FPS = 8
TOP = 0.05
STATIC_TOP = 0.02


def top_mean(magnitude: np.ndarray, share: float) -> float:
    """Mean of the largest `share` of values of a picture [H, W]."""
    count = int(magnitude.size * share)
    if count < 1:
        return float(magnitude.max())
    return float(np.partition(magnitude.ravel(), -count)[-count:].mean())


def flow_magnitude(first: np.ndarray, second: np.ndarray, resources: Resources) -> np.ndarray:
    """RAFT's flow magnitude between two uint8 frames [H, W, 3], in pixels, on the padded picture.

    Raises MeasurementError for pictures that are smaller than RAFT can see.
    """
    if min(first.shape[:2]) < SMALLEST:
        size = f"{first.shape[1]}x{first.shape[0]}"
        raise MeasurementError(f"RAFT needs pictures of at least {SMALLEST} pixels a side, not {size}")
    images = pad_to_stride(to_tensor(np.stack([first, second])))
    flow = resources.features("raft", images, lambda raft, pair: raft(pair[:1], pair[1:], ITERATIONS))
    return np.hypot(flow[0, 0], flow[0, 1])


def pair_scores(view: View, resources: Resources, step: int) -> np.ndarray:
    """Largest-5-% mean flow of frames (0, step), (step, 2 step), ...: [P]."""
    key = f"raft top {TOP}:{resources.fingerprint('raft')}"
    return view.pairs(key, lambda a, b: top_mean(flow_magnitude(a, b, resources), TOP), step)


def is_dynamic(scores: np.ndarray, frames: int, short_side: int) -> bool:
    """VBench's decision: at least round(4 N / 16) of the pairs move more than 6 px per 256 px of the short side.

    N frames were sampled. Python's rounding: half to even, so two frames always pass.
    """
    if len(scores) == 0:
        return False
    threshold = 6.0 * short_side / 256.0
    return int((scores > threshold).sum()) >= round(4 * frames / 16.0)


@metric("dynamic_degree", suites=("vbench", "vbench-long"), needs=("raft",), min_frames=2)
def dynamic_degree(view: View, resources: Resources) -> Measurement:
    """VBench dynamic degree (RAFT): 1 if enough sampled pairs move, else 0."""
    step = max(1, round(view.fps / SAMPLE_FPS))
    scores = pair_scores(view, resources, step)
    sampled = len(range(0, len(view), step))
    moved = is_dynamic(scores, sampled, view.short_side)
    magnitude = float(scores.mean()) if len(scores) else 0.0
    return Measurement(value=float(moved), details={"magnitude": magnitude})


@metric("flow_magnitude", suites=("drift",), needs=("raft",), higher_is_better=None, min_frames=2)
def flow_magnitude_per_second(view: View, resources: Resources) -> Measurement:
    """Dynamic degree as a magnitude: speed of the fastest 5 % of pixels (RAFT), in short sides per second."""
    step = max(1, round(view.fps / SAMPLE_FPS))
    scores = pair_scores(view, resources, step) * view.fps / step / view.short_side
    return Measurement(value=float(scores.mean()) if len(scores) else None, count=max(1, len(scores)))


def is_static(view: View, resources: Resources) -> bool:
    """VBench's static filter: few consecutive pairs move, and neither do first and last frame against each other.

    Raises MeasurementError where RAFT has no answer: a video whose motion is unknown is not a static one.
    """

    def score(first: np.ndarray, second: np.ndarray) -> float:
        return top_mean(flow_magnitude(first, second, resources), STATIC_TOP)

    threshold = 3.0 * view.short_side / 256.0
    allowed = round(2 * len(view) / 16.0)
    last = len(view) - 1
    ends = [(0, last), (last, 0)]
    consecutive = [(first, first + 1) for first in range(last)]
    # Asked for together: one pass over the frames serves both.
    scores = view.per_group(f"raft top {STATIC_TOP}:{resources.fingerprint('raft')}", score, consecutive + ends)
    moving, drift = int((scores[:last] > threshold).sum()), float(scores[last:].max())
    return moving <= allowed and drift <= threshold * allowed * 2
