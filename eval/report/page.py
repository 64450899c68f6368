"""Assembling the page: scores with intervals, comparison of runs, drift curves, best and worst clips, provenance."""

from __future__ import annotations

import html
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from sparse_forcing.eval.measuring.statistics import paired_difference
from sparse_forcing.eval.report.charts import Series, color, line_chart
from sparse_forcing.eval.report.clips import VideoTags, filmstrip, rank
from sparse_forcing.eval.report.style import CSS
from sparse_forcing.files import atomic_write_text

SHOWN = 4  # clips at each end
LISTED = 200  # failures that the page names
Results = dict[str, Any]


def write_report(path: Path, runs: list[Results], *, embed_videos: bool = True) -> None:
    """Write the page for the first run, compared with the others. Raises OutputError."""
    atomic_write_text(path, build_page(path, runs, embed_videos=embed_videos))


def build_page(path: Path, runs: list[Results], *, embed_videos: bool) -> str:
    """The HTML text; `path` is where it will lie (videos that are not embedded are linked relative to it)."""
    names = _names(runs)
    sections = [
        _header(runs, names),
        _scores(runs, names),
        _totals(runs, names),
        _drift(runs, names),
        _clips(runs[0], VideoTags(path, embed_videos)),
        _failures(runs[0]),
        _differences(runs[0]),
        _provenance(runs, names),
    ]
    title = html.escape(f"Evaluation: {names[0]}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head>'
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _names(runs: list[Results]) -> list[str]:
    """Short, distinct names of runs: their target's last part, numbered where two are the same."""
    raw = [Path(run["target"]).stem or run["target"] for run in runs]
    return [name if raw.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(raw, 1)]


def _header(runs: list[Results], names: list[str]) -> str:
    run = runs[0]
    keys = "".join(
        f'<span class="key" style="background:{color(number)}"></span>{html.escape(name)}'
        for number, name in enumerate(names)
    )
    facts = f"suite {run['suite']}, {run['mode']} mode, {run['videos_measured']} videos measured"
    if run["failures"]:
        facts += f", {len(run['failures'])} failed"
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in run["notes"])
    return (
        f"<h1>{html.escape(names[0])}</h1><p class=note>{html.escape(facts)}{keys if len(runs) > 1 else ''}</p>{notes}"
    )


def _scores(runs: list[Results], names: list[str]) -> str:
    metrics = sorted({name for run in runs for name in run["metrics"]})
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    changes = "".join(f"<th>first run against {html.escape(name)}</th>" for name in names[1:])
    rows = "".join(_score_row(name, runs) for name in metrics)
    return (
        "<h2>Scores</h2><p class=note>Mean and 95 % interval (bootstrap over prompts). Differences are paired by "
        f'prompt.</p><div class="scroll"><table><thead><tr><th>metric</th>{heads}{changes}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _score_row(name: str, runs: list[Results]) -> str:
    known = next(run["metrics"][name] for run in runs if name in run["metrics"])
    mark = ", stand-in" if known["stand_in"] else ""
    arrow = {True: "higher is better", False: "lower is better", None: "no better direction"}[known["higher_is_better"]]
    cells = [f"<td>{html.escape(name)}<small>{html.escape(known['summary'])} ({arrow}{mark})</small></td>"]
    for run in runs:
        entry = run["metrics"].get(name)
        cells.append("<td>-</td>" if entry is None else f"<td>{entry['score']:.4f}{_interval(entry['interval'])}</td>")
    cells += [_difference_cell(name, other, runs[0], known["higher_is_better"]) for other in runs[1:]]
    return f"<tr>{''.join(cells)}</tr>"


def _interval(interval: list[float] | None) -> str:
    return f"<small>[{interval[0]:.4f}, {interval[1]:.4f}]</small>" if interval else ""


def _difference_cell(name: str, other: Results, run: Results, higher_is_better: bool | None) -> str:
    first, second = prompt_means(other, name), prompt_means(run, name)
    if not first.keys() & second.keys():
        return "<td>-<small>no shared prompt</small></td>"
    change, interval, prompts = paired_difference(first, second)
    clear = interval is not None and (interval[0] > 0 or interval[1] < 0) and higher_is_better is not None
    kind = ("better" if (change > 0) == higher_is_better else "worse") if clear else ""
    shown = f"[{interval[0]:+.4f}, {interval[1]:+.4f}], " if interval else ""
    return f'<td class="{kind}">{change:+.4f}<small>{shown}{prompts} prompts</small></td>'


def prompt_means(run: Results, name: str) -> dict[Any, float]:
    """Mean of a metric for each prompt of a run (videos without a prompt count by file name)."""
    values: dict[Any, list[float]] = defaultdict(list)
    for record in run["videos"]:
        row = record.get("metrics", {}).get(name)
        if row and row["value"] is not None:
            text = record["original_prompt"] if record["original_prompt"] is not None else record["prompt"]
            values[Path(record["video"]).name if text is None else text].append(row["value"])
    return {prompt: float(np.mean(found)) for prompt, found in values.items()}


def _totals(runs: list[Results], names: list[str]) -> str:
    if not any("totals" in run for run in runs):
        return ""
    rows = []
    for name, run in zip(names, runs):
        totals = run.get("totals", {})
        cells = "".join(
            f"<td>{'-' if totals.get(key) is None else format(totals[key], '.2f')}</td>"
            for key in ("quality", "semantic", "total")
        )
        note = totals.get("refused") or ("incomplete: " + str(totals["incomplete"]) if "incomplete" in totals else "")
        rows.append(f"<tr><td>{html.escape(name)}<small>{html.escape(note)}</small></td>{cells}</tr>")
    return (
        "<h2>VBench totals (percent)</h2><table><thead><tr><th>run</th><th>quality</th><th>semantic</th><th>total</th>"
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _drift(runs: list[Results], names: list[str]) -> str:
    with_drift = [(name, run["drift"]) for name, run in zip(names, runs) if "drift" in run]
    if not with_drift:
        return ""
    metrics = sorted({name for _, drift in with_drift for name in drift["metrics"]})
    charts = []
    for metric in metrics:
        series = [
            Series(label=name, x=drift["metrics"][metric]["times"], **drift["metrics"][metric]["curve"])
            for name, drift in with_drift
            if metric in drift["metrics"]
        ]
        charts.append(line_chart(metric, series))
    opening = [
        Series(
            label=name, x=list(range(1, len(drift["opening_similarity"]["mean"]) + 1)), **drift["opening_similarity"]
        )
        for name, drift in with_drift
        if drift["opening_similarity"]["mean"]
    ]
    if opening:
        charts.append(line_chart("similarity to the opening", opening, "window"))
    return f'<h2>Drift</h2>{_drift_table(with_drift, metrics)}<div class="charts">{"".join(charts)}</div>'


def _drift_table(with_drift: list[tuple[str, dict[str, Any]]], metrics: list[str]) -> str:
    columns = ("slope", "change", "absolute_change", "spread", "vde")
    rows = []
    for metric in metrics:
        for name, drift in with_drift:
            numbers = drift["metrics"].get(metric)
            if numbers is None:
                continue
            cells = "".join(f"<td>{_mean_cell(numbers[column])}</td>" for column in columns)
            label = metric if len(with_drift) == 1 else f"{metric}, {name}"
            rows.append(f"<tr><td>{html.escape(label)}</td>{cells}</tr>")
    heads = ("slope per minute", "last - first 5 s", "absolute", "spread", "drift error (VDE)")
    extras = []
    for name, drift in with_drift:
        ratios = [f"{key} {value['mean']:.3f}" for key, value in drift["late_early_ratios"].items() if value]
        if drift["no_repeat_share"] is not None:
            ratios.append(f"{100 * drift['no_repeat_share']:.0f} % of {drift['no_repeat_videos']} videos do not repeat")
        if ratios:
            extras.append(f"<p class=note>{html.escape(name)}: late/early {html.escape(', '.join(ratios))}</p>")
    return (
        f'<div class="scroll"><table><thead><tr><th>metric</th>{"".join(f"<th>{head}</th>" for head in heads)}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>{''.join(extras)}"
    )


def _mean_cell(number: dict[str, Any] | None) -> str:
    return "-" if number is None else f"{number['mean']:+.4f}{_interval(number['interval'])}"


def _clips(run: Results, tags: VideoTags) -> str:
    ranked = rank(run)
    if not ranked:
        return ""
    if len(ranked) <= 2 * SHOWN:
        return "<h2>Clips, best first</h2>" + "".join(_clip(score, record, tags) for score, record in ranked)
    best = "".join(_clip(score, record, tags) for score, record in ranked[:SHOWN])
    worst = "".join(_clip(score, record, tags) for score, record in reversed(ranked[-SHOWN:]))
    note = "<p class=note>By mean z-score over the metrics that have a better direction.</p>"
    return f"<h2>Best clips</h2>{note}{best}<h2>Worst clips</h2>{worst}"


def _clip(score: float, record: dict[str, Any], tags: VideoTags) -> str:
    path = Path(record["video"])
    strip = filmstrip(path, record["frames"]) or '<span class="note">cannot be decoded any more</span>'
    caption = record["prompt"] if record["prompt"] is not None else path.name
    facts = f"{path.name}, {record['frames']} frames at {record['fps']:g} fps, {score:+.2f}"
    text = f"<p>{html.escape(caption[:300])}<br><small>{html.escape(facts)}</small></p>"
    return f'<div class="clip">{tags.tag(path)}<div>{strip}{text}</div></div>'


def _failures(run: Results) -> str:
    lines = [failure["error"] for failure in run["failures"]]
    for entry in run.get("missing_values", []):
        lines.append(f"{Path(entry['video']).name}, {entry['metric']}: {entry['error']}")
    if not lines:
        return ""
    shown = "".join(f"<li>{html.escape(line)}</li>" for line in lines[:LISTED])
    rest = f"<p class=note>and {len(lines) - LISTED} more, see results.json</p>" if len(lines) > LISTED else ""
    return f"<h2>Not measured</h2><ul>{shown}</ul>{rest}"


def _differences(run: Results) -> str:
    """What these scores are known to differ in from the official tool's, and by how much."""
    lines = "".join(
        f"<li>{html.escape(entry['what'])} <small>{html.escape(', '.join(entry['metrics']))}: "
        f"up to {entry['size']:g}</small></li>"
        for entry in run.get("differences", [])
    )
    return f"<h2>Differences from VBench</h2><ul>{lines}</ul>" if lines else ""


def _provenance(runs: list[Results], names: list[str]) -> str:
    blocks = []
    for name, run in zip(names, runs):
        facts = {key: run[key] for key in ("target", "suite", "mode", "versions", "networks", "settings", "skipped")}
        text = html.escape(json.dumps(facts, indent=1, ensure_ascii=False))
        blocks.append(f"<details><summary>{html.escape(name)}</summary><pre>{text}</pre></details>")
    return f"<h2>How it was measured</h2>{''.join(blocks)}"
