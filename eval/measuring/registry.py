"""The registry of metrics: a new metric is one file below `eval/metrics` with a function under `@metric(...)`."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sparse_forcing.errors import ConfigError, MeasurementError
from sparse_forcing.eval.measuring.view import View

if TYPE_CHECKING:
    from sparse_forcing.eval.measuring.resources import Resources


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a metric says about one view.

    value: the score, None when the metric does not apply (skipped in every mean).
    count: over how many frames or pairs it averages: the weight in a pooled mean.
    details: anything else worth recording, as JSON.

    Raises MeasurementError where one of these is NaN or infinite: such a number is no score and no JSON.
    """

    value: float | None
    count: float = 1.0
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, content in (("value", self.value), ("count", self.count), *self.details.items()):
            if not _is_finite(content):
                raise MeasurementError(f"the {name} is not a finite number: {content!r:.80}")


def _is_finite(content: object) -> bool:
    """Whether every number in JSON-like content is finite."""
    if isinstance(content, dict):
        return all(_is_finite(value) for value in content.values())
    if isinstance(content, (list, tuple)):
        return all(_is_finite(value) for value in content)
    return not isinstance(content, float) or math.isfinite(content)


MetricFunction = Callable[[View, "Resources"], Measurement]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric and what has to be known to run it and to read its numbers."""

    name: str
    compute: MetricFunction
    summary: str
    suites: tuple[str, ...]
    higher_is_better: bool | None = True  # None: neither direction is better in itself
    needs: tuple[str, ...] = ()  # names of networks in `Resources`; absent ones skip the metric
    needs_text: bool = False
    min_frames: int = 1
    segment_seconds: float = 0.0  # drift measures it in windows at least this long
    pooled: bool = False  # the data set's score is the pooled mean
    version: int = 1  # raised when the numbers change, so that cached results are not reused

    @property
    def module(self) -> str:
        """Name of the module that defines it."""
        return self.compute.__module__


_METRICS: dict[str, Metric] = {}


def metric(name: str, **options: Any) -> Callable[[MetricFunction], MetricFunction]:
    """Register a function (view, resources) -> Measurement under a name; its docstring's first line is the summary."""

    def register(compute: MetricFunction) -> MetricFunction:
        summary = (compute.__doc__ or "").strip().splitlines()[0].rstrip(".")
        known = _METRICS.get(name)
        if known is not None and known.module != compute.__module__:
            raise ValueError(f"metric {name} is defined in {known.module} and {compute.__module__}")
        _METRICS[name] = Metric(name=name, compute=compute, summary=summary, **options)
        return compute

    return register


@lru_cache(maxsize=1)
def _discover() -> None:
    package = importlib.import_module("sparse_forcing.eval.metrics")
    try:
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    except ImportError as error:
        if error.name != "cv2":
            raise
        raise ConfigError("the metrics need OpenCV; install it with: pip install 'sparse-forcing[eval]'") from error


def all_metrics() -> dict[str, Metric]:
    """Every metric by name, sorted."""
    _discover()
    return dict(sorted(_METRICS.items()))


def suite_metrics(suite: str, names: tuple[str, ...] = ()) -> list[Metric]:
    """The metrics of a suite, or those of them that are named. Raises ConfigError for a name it does not have."""
    members = {name: entry for name, entry in all_metrics().items() if suite in entry.suites}
    for name in names:
        if name not in members:
            raise ConfigError(f"suite {suite} has no metric {name!r}; it has {', '.join(members)}")
    return [entry for name, entry in members.items() if not names or name in names]
