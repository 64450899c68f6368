"""Plots of the reproduction (accuracy, drift and cache over the horizon) and a sheet of frames for the eye."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw

from sparse_forcing.eval.report.charts import color
from sparse_forcing.files import atomic_path
from sparse_forcing.reproduction.students import read_frames

SCALE, MARGIN, LINE = 2, 4, 14  # whole-number enlargement of frames, gap and text height in pixels
LABEL = 150


def draw_plots(result: Mapping[str, Any], out: Path) -> None:
    """Draw accuracy.png, drift.png and cache.png."""
    horizons = [int(h) for h in next(iter(result["variants"].values()))["horizons"]]
    for path, group, measures, label in (
        ("accuracy.png", "accuracy", ("all", "attributes"), "percent right"),
        ("drift.png", "drift", ("mean",), "change of the picture, percent of full scale"),
    ):
        curves = {
            measure: {
                name: [row["horizons"][str(h)][group][measure] for h in horizons]
                for name, row in result["variants"].items()
            }
            for measure in measures
        }
        _draw_intervals(curves, horizons, label, out / path)
    _draw_cache(result, out / "cache.png")


def _draw_intervals(
    panels: Mapping[str, Mapping[str, list[dict[str, Any]]]], horizons: list[int], label: str, path: Path
) -> None:
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels) + 2, 4), squeeze=False, layout="constrained")
    for ax, (measure, curves) in zip(axes[0], panels.items()):
        for number, (name, cells) in enumerate(curves.items()):
            x = np.arange(len(horizons)) + 0.04 * (number - len(curves) / 2)  # side by side, so that bars stay apart
            means = 100 * np.array([cell["mean"] for cell in cells])
            ends = 100 * np.array([cell["interval"] or (cell["mean"],) * 2 for cell in cells]).T
            ax.errorbar(
                x,
                means,
                yerr=np.abs(ends - means),
                label=name,
                color=color(number),
                marker="o",
                markersize=3,
                capsize=2,
                linewidth=1,
            )
        ax.set_xticks(range(len(horizons)), [f"{h}x" for h in horizons])
        ax.set(xlabel="horizon, training lengths", ylabel=label, title=measure)
        ax.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    _save(figure, path)


def _draw_cache(result: Mapping[str, Any], path: Path) -> None:
    plt = _pyplot()
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, (name, row) in enumerate(result["variants"].items()):
        mib = np.array(row["cache_bytes"]) / 2**20
        ax.plot(np.arange(1, len(mib) + 1), mib, label=name, color=color(number), linewidth=1)
    ax.set(xlabel="chunk", ylabel="cache of one video, MiB")
    ax.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    _save(figure, path)


def contact_sheet(folders: Mapping[str, Path], prompts: list[str], horizons: list[int], path: Path) -> None:
    """A row for each variant, a group of columns for each prompt: the middle frame of every horizon."""
    rows = {
        name: [read_frames(folder, i, prompt) for i, prompt in enumerate(prompts)] for name, folder in folders.items()
    }
    height, width = next(iter(rows.values()))[0].shape[:2]
    height, width = SCALE * height, SCALE * width
    sheet = Image.new(
        "RGB", (LABEL + len(prompts) * (width + MARGIN), 2 * LINE + len(rows) * (height + MARGIN)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        left = LABEL + column * (width + MARGIN)
        draw.text((left, 0), _cut_to_width(draw, prompt, width), "black")
        for place, horizon in enumerate(horizons):
            draw.text((left + place * width // len(horizons), LINE), f"{horizon}x", "black")
    for line, (name, strips) in enumerate(rows.items()):
        top = 2 * LINE + line * (height + MARGIN)
        draw.text((MARGIN, top), name, "black")
        for column, strip in enumerate(strips):
            enlarged = Image.fromarray(strip).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (LABEL + column * (width + MARGIN), top))
    with atomic_path(path) as temporary:
        iio.imwrite(temporary, np.asarray(sheet), plugin="pillow", extension=".png")


def _cut_to_width(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    while text and draw.textlength(text) > width:
        text = text[:-1]
    return text


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    _pyplot().close(figure)
