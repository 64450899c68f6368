"""Evaluate a folder or manifest of videos with a suite of metrics: the function behind `sparse-forcing evaluate`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.options import EvaluateConfig, Mode, Suite
from sparse_forcing.eval.vbench.aggregate import Totals, aggregate, read_scores
from sparse_forcing.launch import Launch
from sparse_forcing.shards import hold_shard, take_shard

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
    return _merge(config) if config.merge else _measure(config)


def _format_totals(totals: Totals) -> str:
    numbers = {"quality": totals.quality, "semantic": totals.semantic, "total": totals.total}
    return "  ".join(f"{name} {'-' if value is None else f'{value:.2f} %'}" for name, value in numbers.items())


def _measure(config: EvaluateConfig) -> int:
    # Imported here: aggregating scores must not wait for torch.
    from sparse_forcing.devices import resolve_device
    from sparse_forcing.eval.measuring.manifest import load_entries
    from sparse_forcing.eval.results import import_official
    from sparse_forcing.files import check_writable
    from sparse_forcing.launch import join_launch

    assert config.target is not None
    entries = load_entries(config.target)
    if config.suite == "recall" and not any(entry.returns for entry in entries):
        raise ConfigError(
            f"suite recall: {config.target} does not say what returns; give a manifest whose rows have `returns` "
            "(docs/evaluate.md), such as `sparse-forcing data clips --world` writes"
        )
    others = [_load_compared(path) for path in config.compare]
    import_official(config.official_results)  # what is wrong with them is said before anything is measured
    _check_targets(config, [*entries, *(entry for other in others if isinstance(other, list) for entry in other)])
    folder = check_writable(config.output_folder, folder=True)
    check_writable(config.cache_folder, folder=True)
    with join_launch() as launch:
        config = replace(config, device=resolve_device(launch.device(config.device)))
        with launch.hold(lambda: hold_shard(folder, config.shard)):
            code = _measure_together(config, entries, others, launch)
            return max(launch.gather(code))


def _measure_together(config: EvaluateConfig, entries: list[Any], others: list[Any], launch: Launch) -> int:
    """Measure what belongs to the shard, with the other processes of the launch; the first one writes and prints."""
    from sparse_forcing.eval.results import build_results
    from sparse_forcing.eval.run import Runner
    from sparse_forcing.eval.shards import write_shard

    runner = Runner(config)
    first = launch.number == 0
    for name, reason in runner.skipped.items():
        if first and (config.suite.startswith("vbench") or config.metrics):
            print(f"{name}: not measured, {reason}", file=sys.stderr)
    own = take_shard(entries, config.shard)
    records = _measure_with_progress(runner, own, launch)
    measured = [other if isinstance(other, dict) else _measure_with_progress(runner, other, launch) for other in others]
    if not first:
        return 0
    if config.shard is not None:
        path = write_shard(runner, entries, records)
        failed = sum("error" in record for record in records)
        about = f"{len(records)} of {len(entries)} videos, {failed} failed; --merge {path} and the other shards"
        print(json.dumps({"shard": str(path), "videos": len(records), "failed": failed}) if config.json else about)
        return int(bool(records) and (failed == len(records) or (config.strict_exit and failed > 0)))
    compared = [
        other if isinstance(other, dict) else build_results(runner, other) | {"target": str(path)}
        for path, other in zip(config.compare, measured)
    ]
    return _write_results(config, build_results(runner, records), compared)


def _merge(config: EvaluateConfig) -> int:
    from sparse_forcing.eval.results import load_results
    from sparse_forcing.eval.shards import merge_shards
    from sparse_forcing.files import check_writable, output_lock
    from sparse_forcing.inputs import check_targets

    compared = [load_results(path) for path in config.compare]
    shards = config.merge
    config, results = merge_shards(config)
    check_targets(_result_files(config), [*shards, *config.compare, *config.official_results])
    with output_lock(check_writable(config.output_folder, folder=True)):
        return _write_results(config, results, compared)


def _write_results(config: EvaluateConfig, results: dict[str, Any], compared: list[dict[str, Any]]) -> int:
    """Write and print the results of a run; returns its exit code."""
    from sparse_forcing.eval import results as result_files
    from sparse_forcing.eval.report import write_report
    from sparse_forcing.files import atomic_write_text

    folder = config.output_folder
    atomic_write_text(folder / "results.json", result_files.to_json(results))
    atomic_write_text(folder / "videos.csv", result_files.to_csv(results))
    if config.report:
        write_report(folder / "report.html", [results, *compared], embed_videos=config.embed_videos)
    for note in results["notes"]:
        print(note, file=sys.stderr)
    print(json.dumps(_leave_out_videos(results, str(folder))) if config.json else _format_table(results, str(folder)))
    return _choose_exit_code(results, config.strict_exit)


def _result_files(config: EvaluateConfig) -> list[Path]:
    from sparse_forcing.eval.shards import shard_file

    if config.shard is not None:
        return [shard_file(config)]
    return [config.output_folder / name for name in ("results.json", "videos.csv", "report.html")]


def _choose_exit_code(results: dict[str, Any], strict: bool) -> int:
    """1 when nothing could be measured, or with `strict` when anything could not; else 0."""
    failed = sum(
        "error" in record or (bool(record["metrics"]) and all("error" in row for row in record["metrics"].values()))
        for record in results["videos"]
    )
    incomplete = bool(results["failures"] or results["missing_values"])
    return 1 if failed == len(results["videos"]) or (strict and incomplete) else 0


def _check_targets(config: EvaluateConfig, entries: list[Any]) -> None:
    """Refuse an output that would replace videos of `entries`, their manifest, sidecars or captions, results to compare
    with, or that would add to weights."""
    from sparse_forcing.eval.measuring.resources import find_weight_files
    from sparse_forcing.inputs import check_targets

    cache = config.cache_folder
    targets = [*_result_files(config), cache / "records", cache / "features"]
    assert config.target is not None
    inputs = [config.target, *config.compare, *(path / "results.json" for path in config.compare)]
    inputs += [*config.official_results, *(entry.video for entry in entries)]
    inputs += [entry.video.with_suffix(suffix) for entry in entries for suffix in (".json", ".txt")]
    inputs += find_weight_files(config.weights).values()
    models = [Path(name) for option in config.stand_ins if (name := option.partition("=")[2])]
    check_targets(targets, inputs, sealed=models if config.weights is None else [*models, config.weights])


def _load_compared(path: Path) -> dict[str, Any] | list[Any]:
    """What `--compare` names: results of an earlier run, or videos that are still to be measured."""
    from sparse_forcing.eval.measuring.manifest import load_entries
    from sparse_forcing.eval.results import load_results

    saved = path.suffix == ".json" or (path / "results.json").is_file()
    return load_results(path) if saved else load_entries(path)


def _measure_with_progress(runner: Any, entries: list[Any], launch: Launch) -> list[dict[str, Any]]:
    """Records of all entries, each measured by one process of the launch; the first one has a bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from sparse_forcing.eval.run import measure_all

    console = Console(stderr=True)
    columns = ("measuring", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    own = list(launch.share(entries))
    hidden = launch.number > 0 or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True) as progress:
        task = progress.add_task("", total=len(own))

        def report(record: dict[str, Any]) -> None:
            progress.advance(task)
            if "error" in record:
                # Not through rich: a path with brackets is not markup, and a line must stay one line.
                print(record["error"], file=sys.stderr)

        measured = measure_all(runner, own, report)
    records: list[Any] = [None] * len(entries)
    for number, share in enumerate(launch.gather(measured)):
        records[number :: launch.count] = share
    return records


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
