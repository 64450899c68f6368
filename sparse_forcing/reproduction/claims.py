"""The paper's claims against a result of the reproduction: met or not, computed from intervals.

A claim is met when the numbers show it: against the dense student two means differ when their 95 % intervals do not
overlap, against ablations by the 95 % interval of the paired difference over prompts. A claim whose variants were not
measured is neither met nor missed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from sparse_forcing.eval.measuring.statistics import paired_difference, percentile_interval, resample_ratio

SPEEDUP = 1.27
CACHE_SAVED = 0.42
GAP_CLOSED = 1 / 3
RECALL_SHARE = 0.25
FULL_CACHE = ("dense", "dense-absolute")
DENSE = {
    "dense": "with full cache, at the sparse one's relative positions",
    "dense-absolute": "with full cache, at Self-Forcing's absolute positions",
    "dense-window": "with the same window",
}
MEASURES = {"all": "captions entirely right", "attributes": "stated attributes right"}
OTHERS = {
    "training-free": "the same memory only switched on at inference",
    "mean-pooled": "blocks chosen by their mean instead of the learned selector",
    "without-persistent": "no persistent set",
    "without-local-sparsity": "a dense window",
}

Result = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence, whether the numbers show it (None: not measured), and those numbers."""

    text: str
    met: bool | None
    evidence: str

    @property
    def verdict(self) -> str:
        return {True: "met", False: "not met", None: "not measured"}[self.met]


def check_claims(result: Result) -> list[Claim]:
    """Every claim of the paper, in the order of its tables.

    Args:
        result: `variants` (as `evaluate_student` gives them), `timing` and `recall`, either of which may be None.
    """
    late = str(max(map(int, next(iter(result["variants"].values()))["horizons"])))
    return list(_claims(result, late))


def _claims(result: Result, late: str) -> Iterator[Claim]:
    for rival, name in DENSE.items():
        for measure, meaning in MEASURES.items():
            yield _apart(result, late, "accuracy", measure, rival, f"more {meaning} than the dense student {name}")
        yield _apart(result, late, "drift", "mean", rival, f"less drift than the dense student {name}")
    for measure, meaning in MEASURES.items():
        yield _not_worse(result, measure, f"no fewer {meaning} than the dense student")
    yield _faster(result, late)
    yield _smaller_cache(result)
    yield _flat_cache(result)
    for other, meaning in OTHERS.items():
        for measure, words in MEASURES.items():
            yield _compare_pairs(result, late, measure, other, f"more {words} than {other} ({meaning})")
    yield _selector(result)


def _is_measured(result: Result, *names: str) -> bool:
    return all(name in result["variants"] for name in names)


def _missing(text: str, names: Sequence[str]) -> Claim:
    return Claim(text=text, met=None, evidence=f"needs {', '.join(names)}")


def _apart(result: Result, horizon: str, group: str, measure: str, rival: str, text: str) -> Claim:
    """The sparse student is better than the rival and their intervals do not overlap."""
    text = f"{horizon}x: {text}"
    if not _is_measured(result, "sparse", rival):
        return _missing(text, ["sparse", rival])
    cells = {name: result["variants"][name]["horizons"][horizon][group][measure] for name in ("sparse", rival)}
    (low, high), (other_low, other_high) = cells["sparse"]["interval"], cells[rival]["interval"]
    met = low > other_high if group == "accuracy" else high < other_low
    digits = 1 if group == "accuracy" else 2
    evidence = "; ".join(
        f"{name} {100 * c['mean']:.{digits}f} ({_range(c['interval'], digits)})" for name, c in cells.items()
    )
    return Claim(text=text, met=met, evidence=evidence)


def _pair_interval(result: Result, horizon: str, measure: str, other: str) -> tuple[float, tuple[float, float], int]:
    """Mean of sparse - other over the prompts both were judged on, its 95 % interval, and how many."""
    first, second = (result["variants"][name]["records"][horizon][measure] for name in (other, "sparse"))
    shared = min(len(first), len(second))
    mean, interval, count = paired_difference(dict(enumerate(first[:shared])), dict(enumerate(second[:shared])))
    assert interval is not None, "at least two prompts are judged"
    return mean, interval, count


def _compare_pairs(
    result: Result,
    horizon: str,
    measure: str,
    other: str,
    text: str,
    shows: Callable[[float, float], bool] = lambda low, high: low > 0,
) -> Claim:
    text = f"{horizon}x: {text}"
    if not _is_measured(result, "sparse", other):
        return _missing(text, ["sparse", other])
    mean, interval, count = _pair_interval(result, horizon, measure, other)
    evidence = f"sparse - {other} {100 * mean:+.1f} points ({_range(interval)}) on {count} prompts"
    return Claim(text=text, met=shows(*interval), evidence=evidence)


def _not_worse(result: Result, measure: str, text: str) -> Claim:
    """At the training horizon the paired difference is not below zero with its whole interval."""
    return _compare_pairs(result, "1", measure, "dense", text, lambda low, high: high >= 0)


def _faster(result: Result, horizon: str) -> Claim:
    """Against the faster of the dense students, the median over prompts of the ratio of whole rollouts."""
    text = f"{horizon}x: decodes at least {SPEEDUP} times faster than the dense student with full cache"
    students = (result.get("timing") or {}).get("students", {})
    rivals = [name for name in FULL_CACHE if name in students]
    if not rivals or "sparse" not in students:
        return _missing(text, ["timing of sparse and dense"])
    own = students["sparse"]["rollouts"]
    ratios = {name: median(d / s for d, s in zip(students[name]["rollouts"], own)) for name in rivals}
    found = "; ".join(f"{name} / sparse {ratio:.2f}" for name, ratio in ratios.items())
    evidence = f"{found} (median of {len(own)} interleaved rollouts, {result['timing']['threads']} threads)"
    return Claim(text=text, met=min(ratios.values()) >= SPEEDUP, evidence=evidence)


def _peak(result: Result, name: str, horizon: str) -> int:
    return result["variants"][name]["horizons"][horizon]["cache_bytes_peak"]


def _smaller_cache(result: Result) -> Claim:
    text = f"1x: at least {CACHE_SAVED:.0%} less peak cache than the dense student with full cache"
    if not _is_measured(result, "sparse", "dense"):
        return _missing(text, ["sparse", "dense"])
    sparse, dense = (_peak(result, name, "1") for name in ("sparse", "dense"))
    saved = 1 - sparse / dense
    evidence = f"{sparse / 1024:.0f} KiB against {dense / 1024:.0f} KiB: {-saved:+.1%}"
    return Claim(text=text, met=saved >= CACHE_SAVED, evidence=evidence)


def _flat_cache(result: Result) -> Claim:
    text = "cache does not grow beyond the training horizon"
    if not _is_measured(result, "sparse"):
        return _missing(text, ["sparse"])
    horizons = sorted(result["variants"]["sparse"]["horizons"], key=int)
    peaks = {horizon: _peak(result, "sparse", horizon) for horizon in horizons}
    evidence = ", ".join(f"{horizon}x {peak / 1024:.0f} KiB" for horizon, peak in peaks.items())
    return Claim(text=text, met=peaks[horizons[-1]] <= peaks["1"], evidence=evidence)


def _selector(result: Result) -> Claim:
    text = (
        f"the learned selector closes at least a third of the recall gap between mean pooling and the oracle "
        f"at {RECALL_SHARE:.0%}"
    )
    row = next((r for r in result.get("recall") or () if r["share"] == RECALL_SHARE and "learned" in r), None)
    if row is None or row["gap_closed"] is None:
        return _missing(text, ["recall of a learned selector"])
    means = ", ".join(f"{name} {row[name]['mean']:.3f}" for name in ("mean", "learned", "oracle"))
    evidence = f"closes {row['gap_closed']:.0%} ({_range(gap_interval(row))}): {means}"
    return Claim(text=text, met=row["gap_closed"] >= GAP_CLOSED, evidence=evidence)


def gap_interval(row: Mapping[str, Any]) -> tuple[float, float]:
    """Bootstrap 95 % interval over prompts of the share of the gap that a learned selector closes."""
    mean, learned, oracle = (np.array(row[name]["prompts"]) for name in ("mean", "learned", "oracle"))
    return percentile_interval(resample_ratio(learned - mean, oracle - mean, resamples=2000, seed=0))


def _range(interval: Sequence[float], digits: int = 1) -> str:
    return f"{100 * interval[0]:.{digits}f} to {100 * interval[1]:.{digits}f}"
