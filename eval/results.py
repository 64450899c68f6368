"""From records of videos to the results of a run: scores with intervals, totals, drift, provenance; JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.forms import SCHEMA, check_results
from sparse_forcing.eval.measuring.registry import Metric
from sparse_forcing.eval.measuring.statistics import percentile_interval, resample_ratio, summarize
from sparse_forcing.eval.options import EvaluateConfig
from sparse_forcing.eval.run import Record, Runner
from sparse_forcing.eval.scoring import cluster, is_surplus, score_metric
from sparse_forcing.eval.vbench.aggregate import DIMENSIONS, aggregate, check_score
from sparse_forcing.eval.vbench.differences import list_differences
from sparse_forcing.eval.vbench.suites import SAMPLES
from sparse_forcing.files import read_json
from sparse_forcing.versions import list_versions

MAX_BYTES = 1 << 30  # of a results.json
LONG_SECONDS = 5.0  # from here on VBench-Long applies
RESULT_PACKAGES = ("torch", "numpy", "av", "opencv-python-headless", "transformers", "ftfy", "pyiqa")
DRIFT_NUMBERS = ("slope", "first", "last", "change", "absolute_change", "spread", "vde")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What records were measured with: the options, metrics and networks of a run."""

    config: EvaluateConfig
    metrics: list[Metric]
    skipped: dict[str, str]
    fingerprints: dict[str, str]


def build_results(runner: Runner | Measured, records: list[Record]) -> dict[str, Any]:
    """Everything `results.json` holds."""
    config = runner.config
    good = [record for record in records if "error" not in record]
    scores = {metric.name: score_metric(metric, good, config) for metric in runner.metrics}
    metrics = {name: score for name, score in scores.items() if score is not None}
    missing = list_missing(good)
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "suite": config.suite,
        "mode": config.mode,
        "target": str(config.target),
        "videos_measured": len(good),
        "metrics": metrics | import_official(config.official_results, metrics),
        "skipped": runner.skipped,
        "notes": write_notes(config, good, missing),
        "differences": list_differences(config.suite),
        "failures": [{"video": record["video"], "error": record["error"]} for record in records if "error" in record],
        "missing_values": missing,
        "versions": list_versions(RESULT_PACKAGES),
        "networks": runner.fingerprints,
        "settings": {
            "resamples": config.resamples,
            "static_filter": config.static_filter,
            "decoder": "PyAV, in pieces, RGB24",
        },
    }
    if config.suite.startswith("vbench"):
        results["totals"] = totals(results["metrics"])
    if config.suite == "drift":
        results["drift"] = summarize_drift(good, config.resamples)
    results["videos"] = [{key: value for key, value in record.items() if key != "from_cache"} for record in records]
    return results


def list_missing(records: list[Record]) -> list[dict[str, str]]:
    """Values that could not be measured of videos that could: `video`, `metric` and the `error` in one line."""
    missing = []
    for record in records:
        failed = {name: row["error"] for name, row in record["metrics"].items() if "error" in row}
        failed |= {f"drift of {name}": why for name, why in record.get("drift", {}).get("failures", {}).items()}
        missing += [{"video": record["video"], "metric": name, "error": why} for name, why in failed.items()]
    return missing


def write_notes(config: EvaluateConfig, records: list[Record], missing: list[dict[str, str]]) -> list[str]:
    """What a reader of the numbers has to know: how the videos fit the suite, and which values are missing."""
    found = []
    long = sum(record["frames"] / record["fps"] >= LONG_SECONDS for record in records)
    if config.suite == "vbench" and long:
        found.append(
            f"{long} videos last {LONG_SECONDS:g} s or longer: VBench judges those with its long suite (vbench-long)"
        )
    if config.suite == "vbench-long" and long < len(records):
        found.append(
            f"{len(records) - long} videos are shorter than {LONG_SECONDS:g} s: VBench judges those with suite vbench"
        )
    surplus = sum(is_surplus(record) for record in records) if config.suite.startswith("vbench") else 0
    if surplus:
        found.append(
            f"{surplus} videos have a sample number of {SAMPLES} or more: as in VBench, only 0 to {SAMPLES - 1} are "
            "scored for a prompt, but for flickering behind the static filter"
        )
    silent = sum(all(row["value"] is None for row in record["metrics"].values()) for record in records)
    if config.suite == "recall" and silent:
        found.append(f"{silent} videos have no value: nothing is said to return in them, or it could not be measured")
    by_metric: dict[str, list[dict[str, str]]] = defaultdict(list)
    for entry in missing:
        by_metric[entry["metric"]].append(entry)
    for name, entries in by_metric.items():
        first = entries[0]
        found.append(
            f"{name}: no value for {len(entries)} of {len(records)} videos; {first['video']}: {first['error']}"
        )
    return found


def import_official(paths: tuple[Path, ...], measured: Collection[str] = ()) -> dict[str, Any]:
    """Dimensions from `*_eval_results.json` files of the official tool, `{dimension: [score, videos]}`.

    Raises:
        ConfigError: a file is not of that form, or a dimension is there twice or `measured`.
    """
    imported: dict[str, Any] = {}
    for path in paths:
        content = read_json(path, expected="a file of the official tool")
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: expected the official tool's {{dimension: [score, videos]}}")
        for name, value in content.items():
            score = value[0] if isinstance(value, list) and value else value
            if name not in DIMENSIONS:
                raise ConfigError(f"{path}: {name!r:.100} is not a VBench dimension")
            score = check_score(path, name, score)
            if name in measured or name in imported:
                raise ConfigError(f"{path}: {name} is measured or imported already")
            videos = value[1] if isinstance(value, list) and len(value) > 1 and isinstance(value[1], list) else []
            imported[name] = {
                "score": score,
                "aggregation": "official tool",
                "interval": None,
                "videos": len(videos),
                "imported_from": str(path),
                "summary": f"imported from {path.name}",
                "higher_is_better": True,
                "stand_in": False,
            }
    return imported


def totals(metrics: dict[str, Any]) -> dict[str, Any]:
    """VBench's totals of measured and imported dimensions, or why there are none; which prompts are not covered."""
    scores = {name: entry["score"] for name, entry in metrics.items() if name in DIMENSIONS}
    stand_ins = [name for name in scores if metrics[name]["stand_in"]]
    result = aggregate(scores, stand_ins).as_json()
    partial = {
        name: f"{entry['prompts']} of {entry['prompts_expected']} prompts"
        for name, entry in metrics.items()
        if entry.get("prompts_expected", 0) > entry.get("prompts", 0)
    }
    return result | ({"incomplete": partial} if partial else {})


def summarize_drift(records: list[Record], resamples: int) -> dict[str, Any]:
    """Means over videos of every drift number with intervals, and mean curves with a band."""
    by_metric: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for record in records:
        for name, numbers in record["drift"]["metrics"].items():
            by_metric[name].append((cluster(record), numbers))
    summary = {}
    for name, rows in by_metric.items():
        numbers = {key: _average([(prompt, row[key]) for prompt, row in rows], resamples) for key in DRIFT_NUMBERS}
        summary[name] = {**numbers, "curve": mean_curve([(prompt, row["curve"]) for prompt, row in rows], resamples)}
        longest = max(rows, key=lambda pair: len(pair[1]["times"]))[1]["times"]
        summary[name]["times"] = longest
    openings = [(cluster(record), record["drift"]["opening"]) for record in records]
    opening = mean_curve([(prompt, found["curve"]) for prompt, found in openings if found], resamples)
    ratios = {
        name: _average([(cluster(record), record["drift"]["ratios"].get(name)) for record in records], resamples)
        for name in ("saturation", "contrast", "detail", "brightness")
    }
    verdicts = [found["repeats"] for record in records if (found := record["drift"]["repetition"])]
    known = [verdict for verdict in verdicts if verdict is not None]
    return {
        "metrics": summary,
        "opening_similarity": opening,
        "late_early_ratios": ratios,
        "no_repeat_share": 1.0 - sum(known) / len(known) if known else None,
        "no_repeat_videos": len(known),
    }


def _average(rows: list[tuple[str, float | None]], resamples: int) -> dict[str, Any] | None:
    known = [(prompt, value) for prompt, value in rows if value is not None]
    if not known:
        return None
    prompts, values = zip(*known)
    summary = summarize(values, [1.0] * len(values), prompts, resamples=resamples)
    return {"mean": summary.video_mean, "interval": summary.interval, "videos": summary.videos}


def mean_curve(rows: list[tuple[str, list[float]]], resamples: int) -> dict[str, Any]:
    """Mean of curves of different lengths at each window, with a 95 % band over prompts where there are two."""
    length = max((len(curve) for _, curve in rows), default=0)
    mean, low, high = [], [], []
    for at in range(length):
        by_prompt: dict[str, list[float]] = defaultdict(list)
        for prompt, curve in rows:
            if at < len(curve):
                by_prompt[prompt].append(curve[at])
        sums = np.array([sum(values) for values in by_prompt.values()])
        counts = np.array([len(values) for values in by_prompt.values()], dtype=float)
        mean.append(float(sums.sum() / counts.sum()))
        if len(sums) > 1:
            bounds = percentile_interval(resample_ratio(sums, counts, resamples=min(resamples, 500), seed=0))
        else:
            bounds = (mean[-1], mean[-1])
        low.append(bounds[0])
        high.append(bounds[1])
    return {"mean": mean, "low": low, "high": high}


def load_results(path: Path) -> dict[str, Any]:
    """Results of an earlier run: its results.json or the folder that holds it. Raises ConfigError."""
    file = path / "results.json" if path.is_dir() else path
    content = read_json(file, max_bytes=MAX_BYTES, expected="a results.json of this tool")
    return check_results(content, file)


def to_csv(results: dict[str, Any]) -> str:
    """One row a video, one column a metric; the last column says what failed and why."""
    names = sorted({name for record in results["videos"] for name in record.get("metrics", {})})
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    fixed = ["video", "prompt", "index", "seed", "frames", "fps", "height", "width", "sha256"]
    writer.writerow([*fixed, *names, "error"])
    for record in results["videos"]:
        values = [record.get("metrics", {}).get(name, {}).get("value") for name in names]
        reasons = [f"{name}: {row['error']}" for name, row in record.get("metrics", {}).items() if "error" in row]
        cells = [record.get(key) for key in fixed] + values + [record.get("error") or "; ".join(reasons) or None]
        writer.writerow(["" if cell is None else _quote_formula(cell) for cell in cells])
    return buffer.getvalue()


def _quote_formula(cell: object) -> object:
    """Text that a spreadsheet would run as a formula gets a quote in front."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in "=+-@\t\r" and cell else cell


def to_json(results: dict[str, Any]) -> str:
    """The content of results.json."""
    return json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
