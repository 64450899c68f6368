"""One video and all metrics of a suite: which of them apply, in which way, and what a failure costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sparse_forcing.eval.drift import DriftSettings, analyse
from sparse_forcing.eval.long import measure_clips, measure_static_clips
from sparse_forcing.eval.measuring.failures import Failure, attempt
from sparse_forcing.eval.measuring.registry import Measurement, Metric
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.view import View
from sparse_forcing.eval.metrics.quality.dynamic_degree import is_static
from sparse_forcing.eval.options import EvaluateConfig
from sparse_forcing.eval.vbench.suites import list_dimensions

Measure = Callable[[Metric, View, Resources], Measurement]
FLICKER = "temporal_flickering"


def measure_view(
    view: View, metrics: Sequence[Metric], resources: Resources, config: EvaluateConfig
) -> tuple[dict[str, Any], bool]:
    """What a record says of a video beside its size (`metrics`, in suite drift also `drift`), and whether to keep it.

    A metric that fails or is not finite has the value None and an `error`. A record is not to be kept when something
    failed that may succeed another time.
    """
    content: dict[str, Any] = {"metrics": {}}
    lasting, working = True, []
    for metric in metrics:
        outcome = attempt(partial(_apply, metric, view, resources, config))
        if isinstance(outcome, Failure):
            lasting = lasting and outcome.lasting
            content["metrics"][metric.name] = {"value": None, "count": 0.0, "details": {}, "error": outcome.reason}
            continue
        working.append(metric)
        if outcome is not None:
            content["metrics"][metric.name] = {
                "value": outcome.value,
                "count": float(outcome.count),
                "details": outcome.details,
            }
    if config.suite == "drift":
        content["drift"], lasting_drift = analyse(view, working, resources, DriftSettings())
        lasting = lasting and lasting_drift
    return content, lasting


def _apply(metric: Metric, view: View, resources: Resources, config: EvaluateConfig) -> Measurement | None:
    """A metric on a video, None when it is not one of the video's dimensions or needs a prompt there is not."""
    if config.suite.startswith("vbench") and metric.name not in list_dimensions(view.text):
        return None
    if (metric.needs_text and view.text is None) or len(view) < metric.min_frames:
        return None
    return _choose(metric, config)(metric, view, resources)


def _choose(metric: Metric, config: EvaluateConfig) -> Measure:
    filtered = metric.name == FLICKER and config.static_filter
    if config.suite == "vbench-long":
        return measure_static_clips if filtered else measure_clips
    return _measure_and_filter if filtered else _measure_plainly


def _measure_plainly(metric: Metric, view: View, resources: Resources) -> Measurement:
    return metric.compute(view, resources)


def _measure_and_filter(metric: Metric, view: View, resources: Resources) -> Measurement:
    measurement = metric.compute(view, resources)
    measurement.details["static"] = is_static(view, resources)
    return measurement
