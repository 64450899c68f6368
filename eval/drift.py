"""What happens to a video over time: curves, slopes, first against last seconds, and repetition.

VBench averages over a clip and cannot see a video decay. Here every metric of the drift suite is measured in windows
of two seconds, and the following numbers describe each curve m(t):

* slope: least squares, per minute
* change, absolute change: mean of the last 5 s minus mean of the first 5 s (Rolling Forcing's quality drift)
* spread: standard deviation over windows (Reward Forcing)
* vde: video drift error of BlockVid (arXiv 2511.22973), sum_{i=2..N} w_i |m_i - m_1| / |m_1| over N = 10 equal chunks,
  w_i = N - i + 1: early chunks weigh most

and for the whole video: similarity to the opening, coherence at frame lags, late/early ratios, repetition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from sparse_forcing.eval.measuring.failures import Failure, attempt
from sparse_forcing.eval.measuring.features import unit
from sparse_forcing.eval.measuring.registry import Metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View
from sparse_forcing.eval.metrics.offline.appearance import descriptors

RATIOS = ("saturation", "contrast", "detail", "brightness")
REPEATS_BELOW = 0.25
_WORKING_SIDE = 32
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class DriftSettings:
    """Seconds of a window and of both ends, chunks of the drift error, frame lags of coherence."""

    window: float = 2.0
    ends: float = 5.0
    chunks: int = 10
    lags: tuple[int, ...] = (2, 5, 10, 20, 50)


def windows(view: View, seconds: float) -> list[View]:
    """Consecutive windows of a view; a rest of at least half a window is one more."""
    size = max(1, round(seconds * view.fps))
    parts = [view.part(at, min(at + size, len(view))) for at in range(0, len(view), size)]
    return [part for part in parts if len(part) * 2 >= size] or [view]


def chunks(view: View, count: int) -> list[View]:
    """`count` equal parts of a view, the remainder at the end dropped; empty when it is too short."""
    size = len(view) // count
    return [view.part(at * size, (at + 1) * size) for at in range(count)] if size else []


def slope_per_minute(times: Sequence[float], values: Sequence[float]) -> float | None:
    """Least-squares slope of values over times in seconds, per minute; None with fewer than two points."""
    t, v = np.asarray(times, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(t) < 2 or np.ptp(t) == 0:
        return None
    t = t - t.mean()
    return float(60.0 * (t * v).sum() / (t * t).sum())


def video_drift_error(values: Sequence[float], *, weights: str = "linear") -> float:
    """VDE of chunk values m_1..m_N; infinite where m_1 is zero. weights: "linear" (N - i + 1) or "log" (log of it)."""
    count = len(values)
    if count < 2:
        raise ValueError(f"the drift error needs two chunks, not {count}")
    if weights not in ("linear", "log"):
        raise ValueError(f"weights {weights!r}: choose linear or log")
    if values[0] == 0:
        return math.inf
    total = 0.0
    for number, value in enumerate(values[1:], 2):
        weight = float(count - number + 1)
        total += (weight if weights == "linear" else math.log(weight)) * abs(value - values[0]) / abs(values[0])
    return total


def measure(metric: Metric, view: View, resources: Resources) -> float | None:
    """A metric's value on a view, None where the view is too short for it or it does not apply."""
    return metric.compute(view, resources).value if len(view) >= metric.min_frames else None


def metric_drift(metric: Metric, view: View, resources: Resources, settings: DriftSettings) -> dict[str, Any] | None:
    """Curve and drift numbers of one metric; None when it applies nowhere."""
    parts = windows(view, max(settings.window, metric.segment_seconds))
    curve = [measure(metric, part, resources) for part in parts]
    known = [(center(part), value) for part, value in zip(parts, curve) if value is not None]
    if not known:
        return None
    times, values = zip(*known)
    ends = min(len(view), max(1, round(settings.ends * view.fps)))
    first = measure(metric, view.part(0, ends), resources)
    last = measure(metric, view.part(len(view) - ends, len(view)), resources)
    change = None if first is None or last is None else last - first
    pieces = [measure(metric, part, resources) for part in chunks(view, settings.chunks)]
    complete = [piece for piece in pieces if piece is not None]
    error = video_drift_error(complete) if len(complete) == settings.chunks else None
    return {
        "times": list(times),
        "curve": list(values),
        "slope": slope_per_minute(times, values),
        "first": first,
        "last": last,
        "change": change,
        "absolute_change": None if change is None else abs(change),
        "spread": float(np.std(values)),
        "vde": error if error is not None and math.isfinite(error) else None,
    }


def center(view: View) -> float:
    """The middle of a view in seconds of its clip."""
    return (view.start + view.stop) / 2 / view.fps


def opening_similarity(view: View, settings: DriftSettings) -> dict[str, Any]:
    """Cosine of each window's mean descriptor with the opening window's, and mean cosine at frame lags."""
    rows = unit(descriptors(view))
    parts = windows(view, settings.window)
    means = unit(np.stack([rows[part.start - view.start : part.stop - view.start].mean(axis=0) for part in parts]))
    lags = {
        str(lag): float(np.einsum("nd,nd->n", rows[lag:], rows[:-lag]).mean())
        for lag in settings.lags
        if lag < len(rows)
    }
    return {"times": [center(part) for part in parts], "curve": (means @ means[0]).tolist(), "lags": lags}


def late_early_ratios(view: View, settings: DriftSettings, metrics: Sequence[Metric], resources: Resources) -> dict:
    """Last over first seconds of saturation, contrast, detail, brightness; None where the first is zero."""
    ends = min(len(view), max(1, round(settings.ends * view.fps)))
    ratios: dict[str, float | None] = {}
    for metric in metrics:
        if metric.name in RATIOS:
            first = measure(metric, view.part(0, ends), resources)
            last = measure(metric, view.part(len(view) - ends, len(view)), resources)
            ratio = last / first if first and last is not None else math.nan
            ratios[metric.name] = ratio if math.isfinite(ratio) else None
    return ratios


def repetition(view: View, *, min_seconds: float = 2.0) -> dict[str, Any]:
    """Whether the video starts over (NoRepeat of RIFLEx, arXiv 2502.15894, with a scale of its own).

    The frame most like the first one (at least `min_seconds` later) is taken as a restart; the distance between what
    follows it and the opening, relative to the median distance of frames that lag, says how much it repeats: 0 for an
    exact loop, about 1 for none. `repeats` below 0.25. Values are None for a still or too short video.
    """
    least = max(1, round(min_seconds * view.fps))
    rows = _shrink_frames(view)
    if len(rows) < 2 * least:
        return {"ratio": None, "repeats": None}
    distance = _measure_distances(rows[least : len(rows) - least + 1], rows[:1])
    restart = least + int(distance.argmin())
    length = min(restart, len(rows) - restart)
    repeated = _measure_distances(rows[restart : restart + length], rows[:length]).mean()
    typical = np.median(_measure_distances(rows[least:], rows[:-least]))
    if typical < 1.0:
        return {"ratio": None, "repeats": None}
    ratio = float(repeated / typical)
    return {"ratio": ratio, "repeats": ratio < REPEATS_BELOW, "restart_seconds": restart / view.fps}


def _measure_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Euclidean distances [N] of thumbnails [N, D] (or [1, D]), in grey levels per pixel, about."""
    pieces = []
    for at in range(0, len(first), _ROWS_AT_ONCE):
        here = first[at : at + _ROWS_AT_ONCE].astype(np.float32)
        there = second if len(second) == 1 else second[at : at + _ROWS_AT_ONCE]
        pieces.append(np.linalg.norm((here - there) / _WORKING_SIDE, axis=1))
    return np.concatenate(pieces)


def _shrink_frames(view: View) -> np.ndarray:
    """Frames shrunk to uint8 [F, 32 * 32 * 3]."""
    import cv2

    def shrink(frames: np.ndarray) -> np.ndarray:
        side = (_WORKING_SIDE, _WORKING_SIDE)
        return np.stack([cv2.resize(frame, side, interpolation=cv2.INTER_AREA).ravel() for frame in frames])

    return view.per_frame("thumbnails", shrink)


def analyse(
    view: View, metrics: Sequence[Metric], resources: Resources, settings: DriftSettings
) -> tuple[dict[str, Any], bool]:
    """All drift numbers of one video, and whether what failed would fail every time.

    A part that fails is None (a metric's curve: absent) and named in `failures` with the reason.
    """
    usable = [metric for metric in metrics if not (metric.needs_text and view.text is None)]
    failures: dict[str, str] = {}
    lasting = True

    def guard(name: str, call: Callable[[], Any]) -> Any:
        nonlocal lasting
        outcome = attempt(call)
        if isinstance(outcome, Failure):
            failures[name], lasting = outcome.reason, lasting and outcome.lasting
            return None
        return outcome

    curves = {
        metric.name: guard(metric.name, partial(metric_drift, metric, view, resources, settings)) for metric in usable
    }
    numbers = {
        "metrics": {name: found for name, found in curves.items() if found is not None},
        "opening": guard("opening", lambda: opening_similarity(view, settings)),
        "ratios": guard("ratios", lambda: late_early_ratios(view, settings, usable, resources)) or {},
        "repetition": guard("repetition", lambda: repetition(view)),
    }
    return numbers | ({"failures": failures} if failures else {}), lasting
