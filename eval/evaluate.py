"""Evaluate a folder or manifest of videos with a suite of metrics: the function behind `sparse-forcing evaluate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sparse_forcing.eval.options import EvaluateConfig, Mode, Suite
from sparse_forcing.eval.vbench.aggregate import Totals, aggregate, read_scores

__all__ = ["EvaluateConfig", "Mode", "Suite", "evaluate"]


def evaluate(config: EvaluateConfig) -> int:
    """Run the evaluation; returns the exit code: 0, 1 when videos failed (see `strict_exit`), 2 for a refused total.

    Prints a table (or with `json` one JSON object) to standard output, and one line for each failed video to standard
    error. Bad input raises a SparseForcingError, which the command line prints as one line (exit 2).
    """
    if config.aggregate is not None:
        totals = aggregate(*read_scores(config.aggregate))
        print(json.dumps(totals.as_json()) if config.json else _format_totals(totals))
        if totals.refused:
            print(f"{config.aggregate}: {totals.refused}", file=sys.stderr)
        return 2 if totals.refused else 0
    return _measure(config)


def _format_totals(totals: Totals) -> str:
    numbers = {"quality": totals.quality, "semantic": totals.semantic, "total": totals.total}
    return "  ".join(f"{name} {'-' if value is None else f'{value:.2f} %'}" for name, value in numbers.items())


def _measure(config: EvaluateConfig) -> int:
    # Imported here: aggregating scores must not wait for torch.
    from sparse_forcing.eval import results as result_files
    from sparse_forcing.eval.measuring.manifest import load_entries
    from sparse_forcing.eval.report import write_report
    from sparse_forcing.eval.run import Runner
    from sparse_forcing.files import atomic_write_text, check_writable, output_lock

    assert config.target is not None
    entries = load_entries(config.target)
    others = [_load_compared(path) for path in config.compare]
    _check_targets(config, entries)
    folder = check_writable(config.output_folder, folder=True)
    check_writable(config.cache_folder, folder=True)
    with output_lock(folder):
        runner = Runner(config)
        for name, reason in runner.skipped.items():
            if config.suite.startswith("vbench") or config.metrics:
                print(f"{name}: not measured, {reason}", file=sys.stderr)
        results = result_files.build_results(runner, _measure_with_progress(runner, entries))
        atomic_write_text(folder / "results.json", result_files.to_json(results))
        atomic_write_text(folder / "videos.csv", result_files.to_csv(results))
        compared = [_measure_compared(runner, path, other) for path, other in zip(config.compare, others)]
        if config.report:
            write_report(folder / "report.html", [results, *compared], embed_videos=config.embed_videos)
    for note in results["notes"]:
        print(note, file=sys.stderr)
    print(json.dumps(_leave_out_videos(results, str(folder))) if config.json else _format_table(results, str(folder)))
    return _choose_exit_code(results, config.strict_exit)


def _choose_exit_code(results: dict[str, Any], strict: bool) -> int:
    """1 when nothing could be measured, or with `strict` when anything could not; else 0."""
    failed = sum(
        "error" in record or (bool(record["metrics"]) and all("error" in row for row in record["metrics"].values()))
        for record in results["videos"]
    )
    incomplete = bool(results["failures"] or results["missing_values"])
    return 1 if failed == len(results["videos"]) or (strict and incomplete) else 0


def _check_targets(config: EvaluateConfig, entries: list[Any]) -> None:
    """Refuse an output that would replace the videos, their manifest or sidecars, results to compare with, weights."""
    from sparse_forcing.inputs import check_targets

    folder, cache = config.output_folder, config.cache_folder
    targets = [
        *(folder / name for name in ("results.json", "videos.csv", "report.html")),
        cache / "records",
        cache / "features",
    ]
    assert config.target is not None
    inputs = [config.target, *config.compare, *(path / "results.json" for path in config.compare)]
    inputs += [*config.official_results, *(entry.video for entry in entries)]
    inputs += [entry.video.with_suffix(".json") for entry in entries if entry.video.parent == folder]
    models = [Path(option.partition("=")[2]) for option in config.stand_ins]
    check_targets(targets, inputs, sealed=models if config.weights is None else [*models, config.weights])


def _load_compared(path: Path) -> dict[str, Any] | list[Any]:
    """What `--compare` names: results of an earlier run, or videos that are still to be measured."""
    from sparse_forcing.eval.measuring.manifest import load_entries
    from sparse_forcing.eval.results import load_results

    saved = path.suffix == ".json" or (path / "results.json").is_file()
    return load_results(path) if saved else load_entries(path)


def _measure_compared(runner: Any, path: Path, other: dict[str, Any] | list[Any]) -> dict[str, Any]:
    from sparse_forcing.eval.results import build_results

    if isinstance(other, dict):
        return other
    return build_results(runner, _measure_with_progress(runner, other)) | {"target": str(path)}


def _measure_with_progress(runner: Any, entries: list[Any]) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from sparse_forcing.eval.run import measure_all

    console = Console(stderr=True)
    columns = ("measuring", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=len(entries))

        def report(record: dict[str, Any]) -> None:
            progress.advance(task)
            if "error" in record:
                # Not through rich: a path with brackets is not markup, and a line must stay one line.
                print(record["error"], file=sys.stderr)

        return measure_all(runner, entries, report)


def _leave_out_videos(results: dict[str, Any], folder: str) -> dict[str, Any]:
    """What `--json` prints: the results without the videos."""
    return {key: value for key, value in results.items() if key != "videos"} | {"output": folder}


def _format_table(results: dict[str, Any], folder: str) -> str:
    lines = [f"{'metric':26} {'score':>8}  {'95 % interval':19} {'videos':>6}  aggregation"]
    for name, entry in results["metrics"].items():
        interval = entry["interval"]
        shown = f"[{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "-"
        mark = " (stand-in)" if entry["stand_in"] else ""
        score = f"{entry['score']:8.4f}"
        lines.append(f"{name:26} {score}  {shown:19} {entry['videos']:6}  {entry['aggregation']}{mark}")
    if "totals" in results:
        lines.append(
            _format_totals(Totals(**{key: results["totals"][key] for key in ("quality", "semantic", "total")}))
        )
        if "refused" in results["totals"]:
            lines.append(results["totals"]["refused"])
    lines.append(f"{results['videos_measured']} videos measured, {len(results['failures'])} failed; see {folder}")
    return "\n".join(lines)
