"""What comes back, by memory: colour, shape and size at an object's return, against the gap, the bytes and the ground.

The truth of a world is given until shortly before the return (see `returns`). All memories see the same worlds, the
same noise and the same weights. `chance` is measured: every answer judged by the returns of all other worlds.

    sparse-forcing bench recall --model MODEL --gaps 1 2 4 --memories full window:8 sparse:4,1,16,paper \
        --output docs/results/recall
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from sparse_forcing.devices import resolve_device
from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.bench.judging import summarize_verdicts
from sparse_forcing.eval.bench.options import RecallBenchConfig
from sparse_forcing.eval.bench.recall_figures import draw_curves, draw_sheet
from sparse_forcing.eval.bench.returns import Answer, Task, answer_tasks, plan_tasks
from sparse_forcing.eval.scene_checker.world_judge import ASPECTS, chance_level
from sparse_forcing.files import atomic_write_json, atomic_write_text, check_writable
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.memory.config import parse_memory
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.scenes.worlds.config import WorldConfig

SHARES = (*ASPECTS, "all")
SHEET_WORLDS = 6
FRAMES_AROUND = 64  # of a gap, before and after


def run(config: RecallBenchConfig) -> int:
    """Every memory over the same worlds; writes recall.json, recall.md, recall.png and sheet.png, prints JSON last."""
    if not config.model:
        raise ConfigError("--model: give a model that has learned worlds; docs/results/recall says how one is made")
    out = check_writable(config.output, folder=True) if config.output else None
    pipe = SparseForcingPipeline.from_pretrained(config.model).to(resolve_device(config.device))
    default = replace(pipe.default_memory, positions=config.positions or pipe.default_memory.positions)
    memories = {name: parse_memory(name, default) for name in config.memories}
    asked = list_cells(config)
    cells = {name: plan_cell(pipe, config, *cell) for name, cell in asked.items()}
    result: dict[str, Any] = {
        "model": config.model,
        "weights_sha256": pipe.weights_sha256,
        "settings": {k: v for k, v in asdict(config).items() if k != "output"},
        "memories": {name: {"memory": asdict(memory), "cells": {}} for name, memory in memories.items()},
    }
    sheets: dict[str, dict[str, list[Answer]]] = {}
    for cell, tasks in cells.items():
        for name, memory in memories.items():
            began = time.perf_counter()
            answers = answer(pipe, memory, tasks, config)
            row = summarize(answers)
            result["memories"][name]["cells"][cell] = row
            sheets.setdefault(cell, {})[name] = answers[:SHEET_WORLDS]
            right, kib = 100 * row["all"]["mean"], row["cache_bytes"] / 1024
            seconds = time.perf_counter() - began
            print(f"{cell}: {name}: {right:.0f} % all right, {kib:.0f} KiB, {seconds:.0f} s", flush=True)
            if out is not None:
                atomic_write_json(out / "recall.json", result)
    print(table(result), flush=True)
    if out is not None:
        atomic_write_text(out / "recall.md", table(result))
        draw_curves(result, out / "recall.png")
        longest = max(cells, key=lambda cell: asked[cell][1])
        draw_sheet(sheets[longest], longest, out / "sheet.png")
    print(json.dumps({k: v for k, v in result.items() if k != "memories"} | {"table": table(result)}))
    return 0


def list_cells(config: RecallBenchConfig) -> dict[str, tuple[str, float, tuple[str, ...]]]:
    """Kind of world, gap in windows and grounds of every cell, by its name; shortest gaps first."""
    grounds = [(ground,) for ground in config.grounds] if config.by_ground else [config.grounds]
    return {
        f"{kind}, gap {gap:g}" + (f", {ground[0]}" if config.by_ground else ""): (kind, gap, ground)
        for kind in config.worlds
        for ground in grounds
        for gap in sorted(config.gaps)
    }


def plan_cell(
    pipe: SparseForcingPipeline, config: RecallBenchConfig, kind: str, gap: float, grounds: tuple[str, ...]
) -> list[Task]:
    """Tasks whose object is out of sight for about `gap` windows of the model's default memory."""
    window = pipe.geometry.temporal_stride * pipe.default_memory.window_frames
    frames = round(gap * window)
    if frames < 1:
        raise ConfigError(f"--gaps: {gap:g} windows of {window} frames are less than a frame; choose a larger gap")
    worlds = WorldConfig(
        frames=config.num_frames or frames + FRAMES_AROUND,
        gap=(frames, frames + 3),
        grounds=grounds,
        split=config.split,
    )
    return plan_tasks(pipe, kind, worlds, config.count, config.seed)


def answer(
    pipe: SparseForcingPipeline, memory: MemoryConfig, tasks: Sequence[Task], config: RecallBenchConfig
) -> list[Answer]:
    """One answer a task, in the tasks' order."""
    batches = answer_tasks(
        pipe,
        memory,
        tasks,
        seed=config.seed,
        batch_size=config.batch_size,
        size=config.size,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
    )
    return sorted((one for batch in batches for one in batch), key=lambda one: one.task.number)


def summarize(answers: Sequence[Answer]) -> dict[str, Any]:
    """Shares that are right with their intervals, chance, the error of the picture, bytes; and verdicts by world."""
    verdicts = {name: [float(getattr(one.verdict, name)) for one in answers] for name in SHARES}
    return {
        **{name: summarize_verdicts(found) for name, found in verdicts.items()},
        "chance": chance_level([one.sighting for one in answers], [one.task.entry for one in answers]),
        "rmse": float(np.mean([one.sighting.rmse for one in answers])),
        "cache_bytes": max(one.cache_bytes for one in answers),
        "latent_frames_given": sorted({one.task.given for one in answers}),
        "worlds": [one.task.number for one in answers],
        "verdicts": verdicts,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: colour, shape, size and all right in percent with the interval of the last, one table a cell."""
    rows = result["memories"]
    cells = list(next(iter(rows.values()))["cells"])
    lines = []
    for cell in cells:
        count = len(next(iter(rows.values()))["cells"][cell]["worlds"])
        lines += [
            f"**{cell} windows**, {count} worlds, percent right at the return\n",
            "| memory | KiB | colour | shape | size | all (95 %) | chance, all | error of the view |",
            "|" + "---|" * 8,
        ]
        for name, row in rows.items():
            found = row["cells"][cell]
            low, high = found["all"]["interval"] or (found["all"]["mean"],) * 2
            shares = " | ".join(f"{100 * found[aspect]['mean']:.0f}" for aspect in ASPECTS)
            lines.append(
                f"| {name} | {found['cache_bytes'] / 1024:.0f} | {shares} | {100 * found['all']['mean']:.0f} "
                f"({100 * low:.0f}-{100 * high:.0f}) | {100 * found['chance']['all']:.0f} | {found['rmse']:.1f} |"
            )
        lines.append("")
    return "\n".join(lines)
