"""Means and their uncertainty: per-video and pooled means, and bootstrap intervals that resample whole prompts.

Videos of one prompt are not independent, so the interval resamples prompts (clusters) with replacement and keeps all
their videos (cluster bootstrap: Davison & Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
_BATCH = 200  # resamples drawn at once: bounds memory for thousands of prompts


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A metric over a data set: both means (named, because they differ when lengths differ) and the 95 % interval."""

    video_mean: float
    pooled_mean: float
    interval: tuple[float, float] | None
    videos: int
    prompts: int


def summarize(
    values: Sequence[float],
    counts: Sequence[float],
    prompts: Sequence[Hashable],
    *,
    pooled: bool = False,
    resamples: int = 2000,
    seed: int = 0,
) -> Summary:
    """Summarise per-video values.

    values: [N] one mean per video; counts: [N] how many frames each averages over (weights of the pooled mean);
    prompts: [N] cluster of each video; pooled: which of the two means the interval is for.
    The interval is None with fewer than two prompts.
    """
    value, count = np.asarray(values, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if not len(value) == len(count) == len(prompts):
        raise ValueError(f"{len(value)} values, {len(count)} counts, {len(prompts)} prompts: lengths must agree")
    if len(value) == 0:
        raise ValueError("nothing to summarise")
    weight = count if pooled else np.ones_like(value)
    totals, masses = cluster_sums(value * weight, weight, prompts)
    draws = resample_ratio(totals, masses, resamples=resamples, seed=seed)
    return Summary(
        video_mean=float(value.mean()),
        pooled_mean=float((value * count).sum() / count.sum()),
        interval=percentile_interval(draws) if len(totals) > 1 else None,
        videos=len(value),
        prompts=len(totals),
    )


def paired_difference(
    first: dict[Hashable, float], second: dict[Hashable, float], *, resamples: int = 2000, seed: int = 0
) -> tuple[float, tuple[float, float] | None, int]:
    """Mean of second - first over the prompts both have, its 95 % interval, and how many prompts that is.

    Pairing by prompt removes the spread between prompts, which is usually larger than the effect. Raises ValueError
    when no prompt is shared.
    """
    shared = sorted(first.keys() & second.keys(), key=repr)
    if not shared:
        raise ValueError("the runs share no prompt")
    difference = np.array([second[prompt] - first[prompt] for prompt in shared])
    draws = resample_ratio(difference, np.ones_like(difference), resamples=resamples, seed=seed)
    return float(difference.mean()), percentile_interval(draws) if len(shared) > 1 else None, len(shared)


def cluster_sums(
    weighted: np.ndarray, weight: np.ndarray, clusters: Sequence[Hashable]
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of weighted values and of weights in each cluster, clusters in order of first appearance."""
    position: dict[Hashable, int] = {}
    member = np.array([position.setdefault(cluster, len(position)) for cluster in clusters])
    return np.bincount(member, weighted, len(position)), np.bincount(member, weight, len(position))


def resample_ratio(totals: np.ndarray, masses: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """[resamples] of sum(totals) / sum(masses) over clusters drawn with replacement."""
    random = np.random.default_rng(seed)
    draws = []
    for start in range(0, resamples, _BATCH):
        chosen = random.integers(0, len(totals), size=(min(_BATCH, resamples - start), len(totals)))
        draws.append(totals[chosen].sum(axis=1) / masses[chosen].sum(axis=1))
    return np.concatenate(draws)


def percentile_interval(draws: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Central percentile interval of bootstrap draws."""
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(draws, [tail, 100.0 - tail])
    return float(low), float(high)
