"""VBench-Long: a long video judged in clips of fixed length, without writing and re-encoding the clips.

Source: Vchitect/VBench `vbench2_beta_long` at 45e79ec. Clips are ranges of frame numbers. Subject and background
consistency fuse the mean inside clips with the consistency of the clips' first frames (clip to clip), mapped through
a published table to the scale of the former. Temporal flickering behind the static filter is judged on static clips.
"""

from __future__ import annotations

import bisect
from functools import lru_cache
from typing import Any

import numpy as np
import yaml

from sparse_forcing.eval.measuring.features import consistency
from sparse_forcing.eval.measuring.registry import Measurement, Metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View
from sparse_forcing.eval.metrics.quality.dynamic_degree import is_static
from sparse_forcing.eval.vbench.suites import DATA, prompt_index
from sparse_forcing.eval.vbench.transforms import dinov2_input, dreamsim_input

CUSTOM_SECONDS = 2
FUSION_WEIGHT = 0.5  # of both parts, as in the official commands (--dev_flag)
FUSED = {"subject_consistency": ("subject", "dinov2"), "background_consistency": ("background", "dreamsim")}


def clip_ranges(frames: int, fps: float, seconds: float) -> list[tuple[int, int]]:
    """Frame ranges of the clips: int(fps) * int(seconds) frames each; a rest becomes one more clip of the LAST frames.

    A video shorter than one clip is one clip. Raises ValueError where a clip would be empty.
    """
    size = int(fps) * int(seconds)
    if size < 1:
        raise ValueError(f"clips of {seconds} s at {fps} frames per second have no frames")
    if frames < size:
        return [(0, frames)]
    ranges = [(at, at + size) for at in range(0, frames - size + 1, size)]
    return ranges if frames % size == 0 else [*ranges, (frames - size, frames)]


@lru_cache(maxsize=1)
def clip_seconds() -> dict[str, float]:
    """Clip length of each dimension."""
    return yaml.safe_load((DATA / "long_clip_seconds.yaml").read_text(encoding="utf-8"))


def seconds_for(text: str | None) -> float:
    """Clip length of a prompt: the longest among the dimensions it serves; 2 s for any other prompt."""
    info = prompt_index().get(text or "")
    return max(clip_seconds()[name] for name in info.dimensions) if info else CUSTOM_SECONDS


@lru_cache(maxsize=2)
def _read_map(kind: str) -> tuple[list[float], list[float]]:
    table = yaml.safe_load((DATA / f"long_{kind}_map.yaml").read_text(encoding="utf-8"))
    points = sorted((float(key), float(value)) for key, value in table.items())
    return [key for key, _ in points], [value for _, value in points]


def map_score(kind: str, score: float) -> float:
    """A clip-to-clip score on the scale of in-clip scores: piecewise linear in the published table, ends clamped."""
    keys, values = _read_map(kind)
    at = bisect.bisect_left(keys, score)
    if at == 0:
        return values[0]
    if at == len(keys):
        return values[-1]
    share = (score - keys[at - 1]) / (keys[at] - keys[at - 1])
    return values[at - 1] + share * (values[at] - values[at - 1])


def fuse(inside: float, mapped: float | None) -> float:
    """In-clip and mapped clip-to-clip score; the former alone where there is no second clip or it maps to zero."""
    if not mapped:
        return inside
    return FUSION_WEIGHT * inside + FUSION_WEIGHT * mapped


def clip_to_clip(name: str, view: View, ranges: list[tuple[int, int]], resources: Resources) -> float | None:
    """Consistency of the clips' first frames, mapped; None with one clip or without the network it needs."""
    kind, network = FUSED[name]
    if len(ranges) < 2 or resources.missing(network):
        return None
    prepare = dinov2_input if network == "dinov2" else dreamsim_input
    rows = []
    for start, _ in ranges:  # one by one: an hour of video has 1800 clips
        rows.append(resources.features(network, prepare(view.pick([start])), lambda encoder, x: encoder(x)))
    value = consistency(np.concatenate(rows)).value
    return None if value is None else map_score(kind, value)


def measure_clips(metric: Metric, view: View, resources: Resources) -> Measurement:
    """A metric over the clips of a long video.

    value: mean over its clips; count: the number of clips. So the video mean weighs videos equally (what the official
    tool means to do) and the pooled mean weighs clips equally (what it does). details: `frames` is the weight of the
    whole video in a mean over frames.
    """
    ranges = clip_ranges(len(view), view.fps, seconds_for(view.text))
    clips = [view.part(start, stop) for start, stop in ranges]
    parts = [metric.compute(clip, resources) for clip in clips if len(clip) >= metric.min_frames]
    scores = [part.value for part in parts if part.value is not None]
    if not scores:
        return Measurement(value=None, details={"clips": 0})
    frames = float(sum(part.count for part in parts if part.value is not None))
    details: dict[str, Any] = {"clips": len(scores), "frames": frames}
    if metric.name in FUSED:
        mapped = clip_to_clip(metric.name, view, ranges, resources)
        details |= {"in_clip": float(np.mean(scores)), "clip_to_clip_mapped": mapped}
        scores = [fuse(score, mapped) for score in scores]
    return Measurement(value=float(np.mean(scores)), count=len(scores), details=details)


def measure_static_clips(metric: Metric, view: View, resources: Resources) -> Measurement:
    """A metric over the clips of a long video that the static filter lets through; value None when there is none.

    details: `static` lists (number of the clip, value), because only a prompt's first static clips are counted.
    """
    ranges = clip_ranges(len(view), view.fps, seconds_for(view.text))
    static: list[tuple[int, float]] = []
    for number, (start, stop) in enumerate(ranges):
        clip = view.part(start, stop)
        if len(clip) >= metric.min_frames and is_static(clip, resources):
            value = metric.compute(clip, resources).value
            if value is not None:
                static.append((number, value))
    if not static:
        return Measurement(value=None, details={"clips": len(ranges), "static": [], "reason": "no clip is static"})
    mean = float(np.mean([value for _, value in static]))
    return Measurement(value=mean, count=len(static), details={"clips": len(ranges), "static": static})
