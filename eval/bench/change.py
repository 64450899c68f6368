"""How well a video follows a prompt that changes on the way, with every memory.

After one clip (the model's default length) one attribute of the caption changes, and two more clips are judged by the
new one. Videos that had it from the start, made of the same noise, are judged beside them, clip by clip: those say what
the model gets right at that age. With `--recache` each memory that can write its window again has a second row, in
which it does so at the change.

    sparse-forcing bench change --prompts 100 --memories sparse window full --batch-size 50 --output docs/results/change
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparse_forcing.devices import resolve_device
from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.bench.judging import (
    ACCURACIES,
    Measurements,
    RolloutSettings,
    judge,
    stream,
    summarize_verdicts,
)
from sparse_forcing.eval.bench.options import ChangeBenchConfig
from sparse_forcing.eval.bench.rollout import choose_memories, compare_memories, percent
from sparse_forcing.eval.scene_checker.caption import ATTRIBUTES
from sparse_forcing.files import check_writable
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.memory.base import REWRITTEN
from sparse_forcing.sampling.arguments import check_memory
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.scenes.held_out import PromptChange, changing_prompts

CLIPS = ("before", "1st after", "2nd after", "1st unchanged", "2nd unchanged")
"""What is judged: the clip before the change, the two after it, and those two of a video whose prompt never changes."""

RECACHED = "+recache"
"""What a memory's name ends with in the row in which its window is written again."""


def run(config: ChangeBenchConfig) -> int:
    """Every memory over the same changes; writes change.json and change.md, prints JSON last."""
    out = check_writable(config.output, folder=True) if config.output else None
    pipe = SparseForcingPipeline.from_pretrained(config.model).to(resolve_device(config.device))
    length = pipe.defaults.num_frames
    if pipe.geometry.whole_chunk_frames(length) != length:
        raise ConfigError(
            f"--model {config.model}: prompts change between chunks, but {length} frames are not whole chunks"
        )
    memories = list(choose_memories(pipe, config.memories).values())
    if not any(memory.kind in REWRITTEN for memory in memories):
        check_memory(memories[0], recache=config.recache)
    changes = changing_prompts(config.prompts, seed=config.seed)

    def measure(memory: MemoryConfig) -> dict[str, tuple[dict, dict]]:
        return {
            ending: (row, {clip: cell["all"] for clip, cell in row["accuracy"].items()})
            for ending, row in measure_memory(pipe, memory, changes, config).items()
        }

    given = {"changes": [change._asdict() for change in changes]}
    compare_memories(config, pipe, given, measure, (table, breakdown), out and out / "change")
    return 0


def measure_memory(
    pipe: SparseForcingPipeline, memory: MemoryConfig, changes: Sequence[PromptChange], config: ChangeBenchConfig
) -> dict[str, dict]:
    """Rows of the table by what they add to the memory's name: the memory as it is, and with its window written again
    where that is asked for and can be. `verdicts` are the judgements behind a row, by clip and attribute, one for each
    change."""
    endings = ("", RECACHED) if config.recache and memory.kind in REWRITTEN else ("",)
    records: dict[str, dict[str, list[Measurements]]] = {ending: {clip: [] for clip in CLIPS} for ending in endings}
    for first in range(0, len(changes), config.batch_size):
        began = time.perf_counter()
        batch = changes[first : first + config.batch_size]
        unchanged = judge_unchanged(pipe, memory, batch, first, config)
        for ending, clips in records.items():
            judged = judge_changed(pipe, memory, batch, first, config, recache=ending == RECACHED) | unchanged
            for clip in CLIPS:
                clips[clip] += judged[clip]
        print(f"  {first + len(batch)}/{len(changes)} changes, {time.perf_counter() - began:.0f} s", flush=True)
    return {ending: _row(memory, clips, changes) for ending, clips in records.items()}


def _row(memory: MemoryConfig, records: dict[str, list[Measurements]], changes: Sequence[PromptChange]) -> dict:
    """One row of the table from the records of its clips."""
    verdicts = {clip: {name: [row[name] for row in judged] for name in ACCURACIES} for clip, judged in records.items()}
    for clip in CLIPS:
        verdicts[clip] |= split_by_change(records[clip], changes)
    return {
        "memory": dataclasses.asdict(memory),
        "accuracy": {
            clip: {name: summarize_verdicts(v) for name, v in columns.items()} for clip, columns in verdicts.items()
        },
        "verdicts": verdicts,
    }


def judge_changed(
    pipe: SparseForcingPipeline,
    memory: MemoryConfig,
    changes: Sequence[PromptChange],
    first: int,
    config: ChangeBenchConfig,
    *,
    recache: bool = False,
) -> dict[str, list[Measurements]]:
    """Records of the videos of a batch of changes, the first of them number `first`, by what is judged."""
    clip = pipe.defaults.num_frames
    befores, afters = [change.before for change in changes], [change.after for change in changes]
    videos = _videos(pipe, memory, befores, first, config, prompt_changes={clip: afters}, recache=recache)
    # What grows may have grown already, but not before it was told to.
    starts = [0 if change.attribute == "motion" else clip for change in changes]
    return {
        "before": _judge_clips(videos, befores, 0, clip, [0] * len(changes)),
        "1st after": _judge_clips(videos, afters, clip, clip, starts),
        "2nd after": _judge_clips(videos, afters, 2 * clip, clip, [start + clip for start in starts]),
    }


def judge_unchanged(
    pipe: SparseForcingPipeline,
    memory: MemoryConfig,
    changes: Sequence[PromptChange],
    first: int,
    config: ChangeBenchConfig,
) -> dict[str, list[Measurements]]:
    """Records of the videos that had the second prompt from their start."""
    clip, afters = pipe.defaults.num_frames, [change.after for change in changes]
    videos = _videos(pipe, memory, afters, first, config, prompt_changes=None, recache=False)
    return {
        "1st unchanged": _judge_clips(videos, afters, clip, clip, [clip] * len(changes)),
        "2nd unchanged": _judge_clips(videos, afters, 2 * clip, clip, [2 * clip] * len(changes)),
    }


def _videos(
    pipe: SparseForcingPipeline,
    memory: MemoryConfig,
    prompts: list[str],
    first: int,
    config: ChangeBenchConfig,
    **changed: Any,
) -> np.ndarray:
    """[B, F, H, W, 3]: three clips of each prompt."""
    settings = RolloutSettings(
        horizons=(3,),
        seed=config.seed,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
    )
    return np.concatenate([chunk.frames for chunk in stream(pipe, memory, prompts, first, settings, **changed)], 1)


def _judge_clips(
    videos: np.ndarray, prompts: Sequence[str], at: int, frames: int, starts: Sequence[int]
) -> list[Measurements]:
    """The clips of videos [B, F, H, W, 3] that begin with frame `at`; starts: how long each has been what it shows."""
    return [judge(video[at : at + frames], prompt, start) for video, prompt, start in zip(videos, prompts, starts)]


def split_by_change(records: Sequence[Measurements], changes: Sequence[PromptChange]) -> dict[str, list[float | None]]:
    """Whether the attribute that changes is right, and whether all others are that the caption states."""
    changed = [record[change.attribute] for record, change in zip(records, changes)]
    others = [
        [record[name] for name in ATTRIBUTES if name != change.attribute and record[name] is not None]
        for record, change in zip(records, changes)
    ]
    return {"changed": changed, "others": [float(all(verdicts)) for verdicts in others]}


def table(result: dict) -> str:
    """Markdown table of a result."""
    lines = [
        f"All right, percent of {len(result['changes'])} videos; what changed and all else: of the 2nd clip after.\n",
        "| memory | before | 1st after | 2nd after | what changed | all else | 1st unchanged | 2nd unchanged |",
        "|" + "---|" * 8,
    ]
    for name, row in result["memories"].items():
        cells = row["accuracy"]
        parts = [cells["2nd after"][part] for part in ("changed", "others")]
        shares = [cells[clip]["all"] for clip in CLIPS]
        lines.append(f"| {name} | {' | '.join(map(with_interval, shares[:3] + parts + shares[3:]))} |")
    return "\n".join(lines) + "\n"


def with_interval(share: dict) -> str:
    """A share and its 95 % interval."""
    low, high = share["interval"] or (None, None)
    return f"{percent(share['mean'])} ({percent(low)}-{percent(high)})"


def breakdown(result: dict) -> str:
    """Markdown table of the second clip after the change, by what changed: the attribute right, all right."""
    attributes = [change["attribute"] for change in result["changes"]]
    kinds = list(dict.fromkeys(attributes))
    lines = [
        "2nd clip after the change, by what changed (that attribute right / all right):\n",
        "| memory | " + " | ".join(f"{kind} ({attributes.count(kind)})" for kind in kinds) + " |",
        "|" + "---|" * (len(kinds) + 1),
    ]
    for name, row in result["memories"].items():
        cells = []
        for kind in kinds:
            own = [number for number, attribute in enumerate(attributes) if attribute == kind]
            verdicts = (row["verdicts"]["2nd after"][part] for part in ("changed", "all"))
            cells.append(" / ".join(percent(summarize_verdicts([v[i] for i in own])["mean"]) for v in verdicts))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
