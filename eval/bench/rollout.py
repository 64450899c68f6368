"""Long-horizon rollouts of the embedded model: caption accuracy, drift, speed and cache bytes of every memory.

All memories get the same noise, sampler and positions unless their name says otherwise.

    sparse-forcing bench rollout --prompts 200 --horizons 1 4 12 --output docs/results/rollout
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparse_forcing.config import to_plain
from sparse_forcing.devices import resolve_device
from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.bench.judging import RolloutSettings, judge_batch, summarize_rollouts, summarize_verdicts
from sparse_forcing.eval.bench.options import JudgedBenchConfig, RolloutBenchConfig
from sparse_forcing.files import atomic_write_json, atomic_write_text, check_writable
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.scenes.captions import parse_caption
from sparse_forcing.scenes.held_out import held_out_prompts
from sparse_forcing.scenes.vocabulary import MOTIONS, SHAPES, SIZES

COLUMNS = ("background", "colour", "shape", "size", "motion", "all")


def memory_variants(default: MemoryConfig) -> dict[str, MemoryConfig]:
    """Memories to compare, each differing from the model's default in one thing."""
    change = dataclasses.replace
    return {
        "full": change(default, kind="full"),
        "full-absolute": change(default, kind="full", positions="absolute"),
        "window": change(default, kind="window"),
        "sink": change(default, kind="sink"),
        "sparse": change(default, kind="sparse"),
        "sparse-without-persistent": change(default, kind="sparse", persistent_blocks=0),
        "sparse-dense-window": change(default, kind="sparse", density=1.0),
        "heavy_hitter": change(default, kind="heavy_hitter"),
    }


def choose_memories(pipe: SparseForcingPipeline, names: Sequence[str]) -> dict[str, MemoryConfig]:
    """The variants of a model's memory by their names. Raises ConfigError for a name that is none."""
    variants = memory_variants(pipe.default_memory)
    unknown = set(names) - set(variants)
    if unknown:
        raise ConfigError(f"memories: unknown {', '.join(sorted(unknown))}; known are {', '.join(variants)}")
    return {name: variants[name] for name in names}


def run(config: RolloutBenchConfig) -> int:
    """Roll out every memory over the same prompts; writes rollout.json and rollout.md, prints JSON last."""
    out = check_writable(config.output, folder=True) if config.output else None
    pipe = SparseForcingPipeline.from_pretrained(config.model).to(resolve_device(config.device))
    prompts = held_out_prompts(config.prompts, seed=config.seed, objects=config.objects)

    def measure(memory: MemoryConfig) -> dict[str, tuple[dict, dict]]:
        row = measure_memory(pipe, memory, prompts, config)
        return {"": (row, {horizon: cell["accuracy"]["all"] for horizon, cell in row["horizons"].items()})}

    compare_memories(config, pipe, {"prompts": prompts}, measure, (table, breakdown), out and out / "rollout")
    return 0


def compare_memories(
    config: JudgedBenchConfig,
    pipe: SparseForcingPipeline,
    given: dict[str, Any],
    measure: Callable[[MemoryConfig], dict[str, tuple[dict, dict]]],
    tables: Sequence[Callable[[dict], str]],
    target: Path | None,
) -> None:
    """Measure the config's memories one after another; after each, what there is goes into the files `target`.json and
    .md. Prints the result as JSON last.

    Args:
        given: what all memories are measured on, for the JSON.
        measure: a memory's rows of the result, by what they add to its name; of each the shares of what is entirely
            right, too.
        tables: Markdown of a result.
    """
    memories = choose_memories(pipe, config.memories)
    rows: dict[str, dict] = {}
    result = {
        "config": to_plain(config),
        "device": str(pipe.device),
        "weights_sha256": pipe.weights_sha256,
        **given,
        "memories": rows,
    }
    for name, memory in memories.items():
        for ending, (row, shares) in measure(memory).items():
            rows[name + ending] = row
            right = {where: share["mean"] for where, share in shares.items()}
            print(f"{name}{ending}: all right {json.dumps(right)}", flush=True)
        if target is not None:
            atomic_write_json(target.with_suffix(".json"), result)
            atomic_write_text(target.with_suffix(".md"), "\n".join(make(result) for make in tables))
    print(json.dumps(result))


def measure_memory(
    pipe: SparseForcingPipeline, memory: MemoryConfig, prompts: list[str], config: RolloutBenchConfig
) -> dict:
    """One row of the table; `verdicts` are the judgements behind it, by horizon and attribute, one for each prompt."""
    settings = RolloutSettings(
        horizons=config.horizons,
        seed=config.seed,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        size=config.size,
    )
    batches = []
    for first in range(0, len(prompts), config.batch_size):
        began = time.perf_counter()
        batches.append(judge_batch(pipe, memory, prompts[first : first + config.batch_size], first, settings))
        done = first + len(batches[-1].prompts)
        print(f"  {done}/{len(prompts)} rollouts, {time.perf_counter() - began:.0f} s", flush=True)
    verdicts = {
        str(horizon): {name: [row[name] for batch in batches for row in batch.records[horizon]] for name in COLUMNS}
        for horizon in config.horizons
    }
    return {"memory": dataclasses.asdict(memory), **summarize_rollouts(pipe, batches), "verdicts": verdicts}


def table(result: dict) -> str:
    """Markdown table of a result."""
    lines = [
        "| memory | horizon | " + " | ".join(COLUMNS) + " | all, 95 % | detail drift | cache KiB |",
        "|" + "---|" * (len(COLUMNS) + 5),
    ]
    for name, row in result["memories"].items():
        for horizon, cell in row["horizons"].items():
            shares = " | ".join(percent(cell["accuracy"][a]["mean"]) for a in COLUMNS)
            low, high = cell["accuracy"]["all"]["interval"] or (None, None)
            lines.append(
                f"| {name} | {horizon}x | {shares} | {percent(low)}-{percent(high)} | "
                f"{cell['drift']['detail']['mean']:.3f} | {cell['cache_bytes_peak'] / 1024:.0f} |"
            )
    return "\n".join(lines) + "\n"


def breakdown(result: dict) -> str:
    """Markdown table of what the first memory gets right at the first horizon, by what the caption says; a caption of
    two objects counts for both."""
    name, row = next(iter(result["memories"].items()))
    horizon, verdicts = next(iter(row["verdicts"].items()))
    scenes = [parse_caption(prompt) for prompt in result["prompts"]]
    lines = [
        f"{name}, {horizon}x, by what the caption says:\n",
        "| caption | prompts | " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * (len(COLUMNS) + 2),
    ]
    for attribute, values in (("shape", SHAPES), ("size", SIZES), ("motion", MOTIONS)):
        for value in values:
            chosen = [
                number for number, scene in enumerate(scenes) if value in (getattr(x, attribute) for x in scene.objects)
            ]
            if chosen:
                shares = " | ".join(
                    percent(summarize_verdicts([verdicts[column][i] for i in chosen])["mean"]) for column in COLUMNS
                )
                lines.append(f"| {value} | {len(chosen)} | {shares} |")
    return "\n".join(lines) + "\n"


def percent(share: float | None) -> str:
    """A share as the table shows it; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f}"
