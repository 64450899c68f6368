"""The reproduction's results as files: JSON of everything, a table, a line for each claim, the selector."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparse_forcing.eval.bench.judging import ACCURACIES
from sparse_forcing.files import atomic_write_text
from sparse_forcing.reproduction.claims import check_claims, gap_interval
from sparse_forcing.reproduction.plots import contact_sheet, draw_plots

COMMAND = "make reproduce"
ROLLOUT_COLUMNS = ("attributes", "all")


def write_results(result: Mapping[str, Any], folders: Mapping[str, Path], prompts: list[str], out: Path) -> None:
    """Write the results of a reproduction: miniature.json, miniature.md, plots and the contact sheet.

    Args:
        result: `settings`, `variants` (without their folders), `timing`, `recall`.
        folders: folder of each variant's frames.
        prompts: those whose frames were kept.
    """
    claims = check_claims(result)
    told = [{"text": c.text, "met": c.met, "evidence": c.evidence} for c in claims]
    atomic_write_text(out / "miniature.json", json.dumps({**result, "claims": told}, allow_nan=False) + "\n")
    lines = [
        "# The paper in miniature",
        "",
        f"Written by `{COMMAND}`; every number and verdict is computed from what miniature.json holds. Accuracy in "
        "percent; drift is the mean change of brightness, contrast, saturation and detail since the training horizon, "
        "in percent of full scale; 95 % intervals over prompts in brackets.",
        "",
        *_rollout_table(result),
        "",
        *_speed_lines(result),
        "| claim | | numbers |",
        "|---|---|---|",
        *(f"| {claim.text} | {claim.verdict} | {claim.evidence} |" for claim in claims),
    ]
    atomic_write_text(out / "miniature.md", "\n".join(lines) + "\n")
    draw_plots(result, out)
    contact_sheet(folders, prompts, sorted(map(int, _horizons(result))), out / "samples.png")


def _horizons(result: Mapping[str, Any]) -> list[str]:
    return list(next(iter(result["variants"].values()))["horizons"])


def _rollout_table(result: Mapping[str, Any]) -> Iterator[str]:
    single = [name for name in ACCURACIES if name not in ROLLOUT_COLUMNS]
    head = ["variant", "horizon", "prompts", *single, *ROLLOUT_COLUMNS, "drift", "peak cache, KiB"]
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for name, row in result["variants"].items():
        for horizon, cell in row["horizons"].items():
            accuracy = cell["accuracy"]
            yield (
                "| "
                + " | ".join(
                    [
                        name,
                        f"{horizon}x",
                        str(row["prompts"]),
                        *(_percent(accuracy[a]["mean"]) for a in single),
                        *(_with_interval(accuracy[a]) for a in ROLLOUT_COLUMNS),
                        _with_interval(cell["drift"]["mean"], 2),
                        f"{cell['cache_bytes_peak'] / 1024:.0f}",
                    ]
                )
                + " |"
            )


def _speed_lines(result: Mapping[str, Any]) -> Iterator[str]:
    if timing := result.get("timing"):
        machine = f"{timing['device']}, {timing['threads']} threads"
        yield f"| decoding, one prompt, {machine} | seconds | last chunk, seconds |"
        yield "|---|---|---|"
        for name, row in timing["students"].items():
            seconds = sorted(row["rollouts"])[len(row["rollouts"]) // 2]
            yield f"| {name} | {seconds:.2f} | {row['chunks'][-1]:.3f} |"
        yield ""


def write_selector(found: Mapping[str, Any], out: Path) -> None:
    """Write recall.json and recall.md of the selector: `recall` rows, and how many `prompts` they come from."""
    rows = found["recall"]
    atomic_write_text(out / "recall.json", json.dumps(found, allow_nan=False) + "\n")
    lines = [
        "# Recall of true attention mass by the block selector",
        "",
        f"Written by `{COMMAND}`: share of dense attention mass inside the chosen window blocks, on the sparse "
        f"student's rollouts of {found['prompts']} held-out prompts; mean and, in brackets, standard deviation over "
        "layers and heads.",
        "",
        "| blocks kept | mean pooling | learned | oracle | gap closed (95 %) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row[n]['mean']:.3f} ({row[n]['spread']:.3f})" if n in row else "-" for n in _SELECTORS]
        closed = "-"
        if row.get("gap_closed") is not None:
            low, high = gap_interval(row)
            closed = f"{row['gap_closed']:.0%} ({low:.0%} to {high:.0%})"
        lines.append(f"| {row['share']:.2%} | {' | '.join(cells)} | {closed} |")
    lines += ["", *_layer_table(rows[-1])]
    atomic_write_text(out / "recall.md", "\n".join(lines) + "\n")


_SELECTORS = ("mean", "learned", "oracle")


def _layer_table(row: Mapping[str, Any]) -> Iterator[str]:
    """Every layer and head at one share."""
    names = [name for name in _SELECTORS if name in row]
    heads = range(len(row[names[0]]["layers"][0]))
    yield f"Each head at {row['share']:.0%}: {' / '.join(names)}."
    yield ""
    yield f"| layer | {' | '.join(f'head {head}' for head in heads)} |"
    yield "|" + "---|" * (len(heads) + 1)
    for layer, _ in enumerate(row[names[0]]["layers"]):
        cells = [" / ".join(f"{row[n]['layers'][layer][head]:.2f}" for n in names) for head in heads]
        yield f"| {layer} | {' | '.join(cells)} |"


def _percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f}"


def _with_interval(cell: Mapping[str, Any], digits: int = 1) -> str:
    if cell["interval"] is None:
        return _percent(cell["mean"], digits)
    low, high = (_percent(end, digits) for end in cell["interval"])
    return f"{_percent(cell['mean'], digits)} ({low}-{high})"
