"""Pictures of `bench recall`: accuracy at return against the gap or by memory, and a sheet of frames for the eye."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sparse_forcing.eval.bench.returns import Answer, world_frames
from sparse_forcing.eval.report.charts import color
from sparse_forcing.files import atomic_path

LEAST_SIDE, MARGIN = 112, 4  # pixels of a picture in the sheet, so that a memory's name fits above it


def draw_curves(result: Mapping[str, Any], path: Path) -> None:
    """Colour and all right, one row of panels a kind of world: against the gap in windows, one curve a memory, or one
    bar a memory where there is a single gap."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = result["memories"]
    cells = list(next(iter(rows.values()))["cells"])
    kinds = {
        cell.split(",")[0]: [other for other in cells if other.split(",")[0] == cell.split(",")[0]] for cell in cells
    }
    single = all(len(own) == 1 for own in kinds.values())
    height = 0.9 + 0.28 * len(rows) if single else 3.6
    figure, axes = plt.subplots(
        len(kinds), 2, figsize=(11, height * len(kinds)), squeeze=False, layout="constrained", sharey=single
    )
    for (kind, own), panels in zip(kinds.items(), axes):
        for ax, aspect in zip(panels, ("colour", "all")):
            chance = 100 * np.mean([row["cells"][cell]["chance"][aspect] for row in rows.values() for cell in own])
            (ax.axvline if single else ax.axhline)(chance, color="0.5", linestyle=":", linewidth=1)
            (_draw_bars if single else _draw_gaps)(ax, rows, own, aspect)
            ax.set_title(f"{own[0] if single else kind}: {aspect} (dotted: chance)", fontsize=10)
            ax.grid(alpha=0.3)
    if not single:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def _shares(row: Mapping[str, Any], cells: Sequence[str], aspect: str) -> tuple[np.ndarray, np.ndarray]:
    """Percent right in each cell, [C], and how far its interval reaches down and up, [2, C]."""
    found = [row["cells"][cell][aspect] for cell in cells]
    means = 100 * np.array([share["mean"] for share in found])
    ends = 100 * np.array([share["interval"] or (share["mean"],) * 2 for share in found]).T
    return means, np.abs(ends - means)


def _draw_gaps(ax: Any, rows: Mapping[str, Any], cells: Sequence[str], aspect: str) -> None:
    for number, (name, row) in enumerate(rows.items()):
        means, reach = _shares(row, cells, aspect)
        x = np.arange(len(cells)) + 0.03 * (number - len(rows) / 2)
        ax.errorbar(
            x,
            means,
            yerr=reach,
            label=f"{name} ({_kib(row, cells)} KiB)",
            color=color(number),
            marker="o",
            markersize=3,
            capsize=2,
            linewidth=1.2,
        )
    ax.set_xticks(range(len(cells)), [cell.partition("gap ")[2] for cell in cells])
    ax.set(xlabel="gap, windows", ylabel="percent right at return", ylim=(-3, 103))


def _draw_bars(ax: Any, rows: Mapping[str, Any], cells: Sequence[str], aspect: str) -> None:
    for number, row in enumerate(rows.values()):
        means, reach = _shares(row, cells, aspect)
        ax.barh(number, means, xerr=reach, color=color(number), height=0.7, capsize=2)
    ax.set_yticks(range(len(rows)), [f"{name}  {_kib(row, cells)} KiB" for name, row in rows.items()], fontsize=8)
    ax.set(xlabel="percent right at return", xlim=(0, 103), ylim=(len(rows) - 0.4, -0.6))


def _kib(row: Mapping[str, Any], cells: Sequence[str]) -> int:
    return round(row["cells"][cells[-1]]["cache_bytes"] / 1024)


def draw_sheet(answers: Mapping[str, Sequence[Answer]], cell: str, path: Path) -> None:
    """For every world a block of rows: first sight, last sight, one frame of the gap and the true return on top, then
    the return that each memory generated."""
    names = list(answers)
    worlds = [one.task for one in answers[names[0]]]
    pixels = answers[names[0]][0].frames.shape[1]
    side = pixels * ceil(LEAST_SIDE / pixels)
    columns = 4 + len(names)
    width = columns * (side + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, len(worlds) * (side + MARGIN) + 40), "white")
    draw = ImageDraw.Draw(sheet)
    titles = ["first sight", "last sight", "in the gap", "true return", *names]
    for column, title in enumerate(titles):
        draw.text((MARGIN + column * (side + MARGIN), 4), f"{title[:22]}", fill="black")
    draw.text((MARGIN, 20), cell, fill="gray")
    for row, task in enumerate(worlds):
        truth = (world_frames(task.world, pixels).numpy() * 255).round().astype(np.uint8)
        entry = task.entry
        at = min(entry.frames[0] + 3, entry.frames[1] - 1)
        shown = [truth[f] for f in (middle(entry.first_seen), entry.last_seen - 2, entry.last_seen + entry.gap // 2)]
        shown.append(truth[at])
        shown += [
            next(one for one in answers[name] if one.task.number == task.number).frames[at - task.given]
            for name in names
        ]
        for column, frame in enumerate(shown):
            picture = Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (MARGIN + column * (side + MARGIN), 36 + row * (side + MARGIN)))
    with atomic_path(path) as temporary:
        sheet.quantize(128, dither=Image.Dither.NONE).save(temporary, format="png", optimize=True)


def middle(frames: tuple[int, int]) -> int:
    """The frame in the middle of a range [begin, end)."""
    return (frames[0] + frames[1] - 1) // 2
