"""From the values of videos to the score of a metric: which videos count, and which mean is taken of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from sparse_forcing.eval.measure import FLICKER
from sparse_forcing.eval.measuring.registry import Metric
from sparse_forcing.eval.measuring.statistics import summarize
from sparse_forcing.eval.options import EvaluateConfig
from sparse_forcing.eval.vbench.aggregate import DIMENSIONS
from sparse_forcing.eval.vbench.suites import SAMPLES, prompt_index, vbench_prompts

STAND_INS = ("detector", "captioner", "actions")  # what these measure is not VBench's
STATIC_PER_PROMPT = 5
Record = dict[str, Any]
Rows = list[tuple[Record, dict[str, Any]]]  # a video's record, and in it the entry of one metric


def score_metric(metric: Metric, records: list[Record], config: EvaluateConfig) -> dict[str, Any] | None:
    """Score, interval and provenance of a metric over a data set; None where no video has a value that counts."""
    rows = select_rows(metric, records, config)
    if not rows:
        return None
    pooled, weight, aggregation = _choose_mean(metric, rows, config)
    summary = summarize(
        [row["value"] for _, row in rows],
        [weight(row) for _, row in rows],
        [cluster(record) for record, _ in rows],
        pooled=pooled,
        resamples=config.resamples,
    )
    result: dict[str, Any] = {
        "score": summary.pooled_mean if pooled else summary.video_mean,
        "aggregation": aggregation,
        "video_mean": summary.video_mean,
        "pooled_mean": summary.pooled_mean,
        "interval": summary.interval,
        "videos": summary.videos,
        "prompts": summary.prompts,
        "summary": metric.summary,
        "higher_is_better": metric.higher_is_better,
        "stand_in": any(name in STAND_INS for name in metric.needs),
    }
    if metric.name in DIMENSIONS and config.suite.startswith("vbench"):
        result["prompts_expected"] = len({row.prompt for row in vbench_prompts() if metric.name in row.dimensions})
    return result


def select_rows(metric: Metric, records: list[Record], config: EvaluateConfig) -> Rows:
    """The videos that count for a metric, with their values."""
    rows = [(record, record["metrics"][metric.name]) for record in records if metric.name in record["metrics"]]
    rows = [(record, row) for record, row in rows if row["value"] is not None]
    if metric.name == FLICKER and config.static_filter:
        by_name = config.mode == "vbench-compatible"
        return _keep_static_clips(rows, by_name) if config.suite == "vbench-long" else _keep_static(rows, by_name)
    if config.suite.startswith("vbench"):
        rows = [(record, row) for record, row in rows if not is_surplus(record)]
    return rows


def is_surplus(record: Record) -> bool:
    """Whether a video is a sample of a VBench prompt beyond those that VBench looks at (numbers 0 to 4)."""
    return record["index"] >= SAMPLES and cluster(record) in prompt_index()


def cluster(record: Record) -> str:
    """What groups the samples of one prompt."""
    text = record["original_prompt"] if record["original_prompt"] is not None else record["prompt"]
    return record["video"] if text is None else text


def _choose_mean(
    metric: Metric, rows: Rows, config: EvaluateConfig
) -> tuple[bool, Callable[[dict[str, Any]], float], str]:
    """Whether the mean is pooled, what a video weighs in it, and what this mean is called."""

    def count(row: dict[str, Any]) -> float:
        return row["count"]

    def frames(row: dict[str, Any]) -> float:
        return row["details"]["frames"]

    if config.suite != "vbench-long":
        return metric.pooled, count, "pooled" if metric.pooled else "video mean"
    # VBench-Long's official result weighs clips, its strict reading and what the static filter lets through videos.
    if config.mode != "vbench-compatible" or (metric.name == FLICKER and config.static_filter):
        return False, count, "video mean"
    if metric.name == "subject_consistency" and all(row["details"]["clips"] == 1 for _, row in rows):
        # Without a second clip in any video the official tool returns what it computed first: the mean over frames.
        return True, frames, "frame-pooled"
    return True, count, "pooled"


def _sample_order(record: Record, by_name: bool) -> tuple[Any, ...]:
    """Samples of a prompt by number, or as the official tool meets them: by file name as text (0, 1, 10, 11, 2)."""
    return (f"{record['index']}.",) if by_name else (record["index"],)


def _keep_static(rows: Rows, by_name: bool) -> Rows:
    """The first five static videos of every prompt."""
    kept: dict[str, Rows] = defaultdict(list)
    for record, row in sorted(rows, key=lambda pair: _sample_order(pair[0], by_name)):
        if row["details"].get("static") and len(kept[cluster(record)]) < STATIC_PER_PROMPT:
            kept[cluster(record)].append((record, row))
    return [pair for pairs in kept.values() for pair in pairs]


def _keep_static_clips(rows: Rows, by_name: bool) -> Rows:
    """Videos with the first five static clips of every prompt: the value is the mean of the clips that are counted."""
    room: dict[str, int] = defaultdict(lambda: STATIC_PER_PROMPT)
    kept: Rows = []
    for record, row in sorted(rows, key=lambda pair: _sample_order(pair[0], by_name)):
        clips = sorted(row["details"]["static"], key=lambda clip: f"{clip[0]:03d}" if by_name else clip[0])
        values = [value for _, value in clips[: room[cluster(record)]]]
        if values:
            room[cluster(record)] -= len(values)
            kept.append((record, {**row, "value": float(np.mean(values)), "count": float(len(values))}))
    return kept
