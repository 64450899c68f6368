"""Means, cluster bootstrap, paired differences."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_forcing.eval.measuring.statistics import paired_difference, summarize


def test_video_and_pooled_mean_differ_when_lengths_differ() -> None:
    summary = summarize([1.0, 0.0], [3, 1], ["a", "b"])
    assert (summary.video_mean, summary.pooled_mean) == (0.5, 0.75)


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        prompts = np.repeat(np.arange(40), 5)
        values = random.normal(0, 1, 40)[prompts] + random.normal(0, 0.1, 200)
        low, high = summarize(values, np.ones(200), list(prompts), resamples=300, seed=trial).interval
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_samples_of_one_prompt_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(1).normal(0, 1, 20)
    once = summarize(values, np.ones(20), list(range(20))).interval
    tenfold = summarize(np.repeat(values, 10), np.ones(200), list(np.repeat(np.arange(20), 10))).interval
    assert tenfold == pytest.approx(once)


def test_one_prompt_has_no_interval() -> None:
    assert summarize([0.1, 0.2], [1, 1], ["a", "a"]).interval is None


def test_pairing_removes_the_spread_between_prompts() -> None:
    random = np.random.default_rng(2)
    base = random.normal(0, 10, 50)
    first = {f"p{number}": value for number, value in enumerate(base)}
    second = {name: value + 0.1 + random.normal(0, 0.05) for name, value in first.items()} | {"extra": 1.0}
    change, interval, shared = paired_difference(first, second)
    assert shared == 50
    assert change == pytest.approx(0.1, abs=0.03)
    assert 0 < interval[0] < interval[1] < 0.2


def test_nothing_and_unequal_lengths_are_errors() -> None:
    with pytest.raises(ValueError, match="nothing"):
        summarize([], [], [])
    with pytest.raises(ValueError, match="lengths"):
        summarize([1.0], [1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match="no prompt"):
        paired_difference({"a": 1.0}, {"b": 1.0})
