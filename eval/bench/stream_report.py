"""What a result of `bench stream` says: figures of the field's protocol, a table, a plot and the files.

The protocol (Self-Forcing, arXiv 2506.08009): how long until the first frames are there, how long a chunk takes, and
frames per second over the first 5, 20 and 60 seconds of video. Means over a horizon count the chunks in which a window
still fills.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_forcing.eval.measuring.roofline import ChunkSizes, Gpu, count_keys, project_chunk
from sparse_forcing.files import atomic_path, atomic_write_json, atomic_write_text

if TYPE_CHECKING:
    from sparse_forcing.eval.bench.stream import Measured
    from sparse_forcing.memory import MemoryConfig

GIB = 1 << 30
HORIZONS = (5, 20, 60)  # seconds of video


def summarize(result: Mapping[str, Any], row: Measured) -> dict[str, Any]:
    """The figures of one memory. `last_third_seconds`: median of the last third of the chunks, when the window is full;
    `first_frames_seconds`: until the first chunk is there; p50 and p95: of the chunks after it."""
    last = statistics.median(row.seconds[-max(1, len(row.seconds) // 3) :])
    rest = row.seconds[1:] or row.seconds
    decoding = row.decode_seconds or [0.0] * len(row.seconds)
    shown = [made + decoded for made, decoded in zip(row.seconds, decoding)]
    return {
        "chunk_seconds": row.seconds,
        "decode_seconds": row.decode_seconds or None,
        "first_frames_seconds": row.seconds[0],
        "first_frames_seconds_decoded": shown[0] if row.decode_seconds else None,
        "p50_seconds": float(np.percentile(rest, 50)),
        "p95_seconds": float(np.percentile(rest, 95)),
        "horizons": horizons(result, row.seconds),
        "last_third_seconds": last,
        "latent_frames_per_second": result["chunk_latent_frames"] / last,
        "pixel_frames_per_second": result["chunk_pixel_frames"] / last,
        "pixel_frames_per_second_decoded": result["chunk_pixel_frames"] / statistics.median(shown[len(shown) // 2 :])
        if row.decode_seconds
        else None,
        "cache_bytes": row.cache_bytes,
        "cache_bytes_peak": max(row.cache_bytes),
        "gpu_peak_bytes": row.gpu_peak_bytes,
        "launches": row.launches,
        "busy_seconds": row.busy_seconds,
    }


def horizons(result: Mapping[str, Any], seconds: list[float]) -> dict[str, float]:
    """Pixel frames per second over the first 5, 20 and 60 seconds of video, as far as the rollout goes."""
    found = {}
    for horizon in HORIZONS:
        count = math.ceil(horizon * result["fps"] / result["chunk_pixel_frames"])
        if count <= len(seconds):
            found[str(horizon)] = count * result["chunk_pixel_frames"] / sum(seconds[:count])
    return found


def ratio(rows: Mapping[str, dict[str, Any]], slow: str, fast: str) -> float | None:
    """Seconds per chunk of one memory over those of another; None unless both were measured."""
    if slow not in rows or fast not in rows:
        return None
    return rows[slow]["last_third_seconds"] / rows[fast]["last_third_seconds"]


def heading(result: Mapping[str, Any]) -> str:
    """One line: model, size, machine, what is left out."""
    return (
        f"{result['config']['model_size']} ({result['parameters'] / 1e9:.2f} B random weights, {result['dtype']}), "
        f"{result['width']}x{result['height']}, {result['config']['chunks']} chunks of {result['chunk_latent_frames']} "
        f"latent frames = {result['chunk_tokens']} tokens, {result['sampler']['steps']} steps and a clean pass; "
        f"{result['device_name']}, torch {result['torch']}{', CUDA graphs' if result['cuda_graphs'] else ''}; decoding "
        f"{result['decoding']}"
    )


def table(result: Mapping[str, Any]) -> str:
    """Markdown table of what was measured."""
    if not result["memories"]:
        return ""
    spans = [str(horizon) for horizon in HORIZONS]
    columns = ["memory", "first frames, s", "p50, s", "p95, s", "last third, s", "latent frames/s", "pixel frames/s"]
    columns += [f"frames/s over {span} s" for span in spans]
    columns += ["decoding a chunk, s", "cache GiB, peak", "GPU GiB, peak", "launches", "GPU busy, s"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name, row in result["memories"].items():
        decoding = row["decode_seconds"]
        cells = [row[key] for key in ("first_frames_seconds", "p50_seconds", "p95_seconds", "last_third_seconds")]
        cells += [row["latent_frames_per_second"], row["pixel_frames_per_second"]]
        cells += [row["horizons"].get(span) for span in spans]
        cells += [None if decoding is None else statistics.median(decoding), row["cache_bytes_peak"] / GIB]
        cells += [None if row["gpu_peak_bytes"] is None else row["gpu_peak_bytes"] / GIB]
        cells += [row["launches"], row["busy_seconds"]]
        shown = ("-" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells)
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    if result["full_over_sparse"] is not None:
        lines += ["", f"A chunk of `full` takes {result['full_over_sparse']:.2f} times as long as one of `sparse`."]
    return "\n".join(lines) + "\n"


def project_memories(
    memories: Mapping[str, MemoryConfig], sizes: ChunkSizes, gpu: Gpu, *, pixel_frames: int, fps: float
) -> dict[str, dict[str, Any]]:
    """Of each memory: tokens that a query attends to and seconds, in all and by parts, of the chunk that ends the
    longest horizon, and frames per second over each horizon. pixel_frames: of a chunk; fps: of the video."""
    counts = {horizon: math.ceil(horizon * fps / pixel_frames) for horizon in HORIZONS}
    last, found = max(counts.values()) - 1, {}
    for name, memory in memories.items():
        chunks = [project_chunk(memory, sizes, number, gpu) for number in range(last + 1)]
        totals = [chunk.total for chunk in chunks]
        spans = {str(horizon): count * pixel_frames / sum(totals[:count]) for horizon, count in counts.items()}
        keys = count_keys(memory, sizes, last)
        found[name] = {"keys": keys, "chunk_seconds": totals[-1], "parts": asdict(chunks[-1]), "horizons": spans}
    return found


def projection_tables(result: Mapping[str, Any]) -> str:
    """The projection as a table of Markdown for each GPU, which says that it is one."""
    spans = [str(horizon) for horizon in HORIZONS]
    lines = []
    for gpu, rows in result["projection"].items():
        lines += [
            "",
            f"Projection for one {gpu} in bfloat16 with CUDA graphs: arithmetic, not measured (a roofline with the "
            "shares of its peaks that an H200 reached; decoding not included).",
            "",
            "| memory | keys of a query | "
            + " | ".join(f"frames/s over {span} s" for span in spans)
            + " | ms a chunk, at the end | products | attention | elementwise | gaps |",
            "|" + "---|" * (len(spans) + 7),
        ]
        for name, row in rows.items():
            cells = [str(row["keys"]), *(f"{row['horizons'][span]:.1f}" for span in spans)]
            cells += [f"{1000 * seconds:.1f}" for seconds in (row["chunk_seconds"], *row["parts"].values())]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write(folder: Path, result: Mapping[str, Any]) -> None:
    """Write stream.json, stream.md and, of what was measured and where there is matplotlib, stream.png."""
    if result["memories"] and importlib.util.find_spec("matplotlib") is not None:
        with atomic_path(folder / "stream.png") as path:
            plot(result, path)
    atomic_write_json(folder / "stream.json", dict(result))
    atomic_write_text(
        folder / "stream.md",
        f"{heading(result)}. Videos play at {result['fps']:g} frames per second.\n\n"
        f"{table(result)}{projection_tables(result)}",
    )


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Seconds of every chunk over the video, a line for each memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, row in result["memories"].items():
        times = [(i + 1) * result["chunk_pixel_frames"] / result["fps"] for i in range(len(row["chunk_seconds"]))]
        axes.plot(times, row["chunk_seconds"], marker=".", label=name)
    axes.set(xlabel="seconds of video", ylabel="seconds a chunk", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
