"""How well a video follows a prompt that changes on the way, with every memory.

After one clip (the model's default length) one attribute of the caption changes; two more clips are judged by the new
caption. The same prompts from the start, with the same noise, say what the model gets right without a past.

    sparse-forcing bench change --prompts 200 --output docs/results/change
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence

import numpy as np

from sparse_forcing.config import to_plain
from sparse_forcing.devices import resolve_device
from sparse_forcing.eval.bench_options import ChangeBenchConfig
from sparse_forcing.eval.bench_rollout import chosen_memories, percent
from sparse_forcing.eval.judged_rollouts import ACCURACIES, Record, RolloutSettings, judge, share_of, stream
from sparse_forcing.eval.metrics.caption import ATTRIBUTES
from sparse_forcing.files import atomic_write_json, atomic_write_text, check_writable
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.pipeline import SparseForcingPipeline
from sparse_forcing.scenes.held_out import PromptChange, changing_prompts

CLIPS = ("before", "during", "after", "unchanged")
"""What is judged: the clip before the change, the clip that begins with it, the one after that, and the second clip of
a video that had the new prompt from its start."""


def run(config: ChangeBenchConfig) -> int:
    """Every memory over the same changes; writes change.json and change.md, prints JSON last."""
    out = check_writable(config.output, folder=True) if config.output else None
    pipe = SparseForcingPipeline.from_pretrained(config.model).to(resolve_device(config.device))
    memories = chosen_memories(pipe, config.memories)
    changes = changing_prompts(config.prompts, seed=config.seed)
    rows: dict[str, dict] = {}
    result = {
        "config": to_plain(config),
        "device": str(pipe.device),
        "weights_sha256": pipe.weights_sha256,
        "changes": [change._asdict() for change in changes],
        "memories": rows,
    }
    for name, memory in memories.items():
        rows[name] = measure_memory(pipe, memory, changes, config)
        right = {clip: cell["all"]["mean"] for clip, cell in rows[name]["accuracy"].items()}
        print(f"{name}: all right {json.dumps(right)}", flush=True)
        if out is not None:
            atomic_write_json(out / "change.json", result)
            atomic_write_text(out / "change.md", f"{table(result)}\n{breakdown(result)}")
    print(json.dumps(result))
    return 0


def measure_memory(
    pipe: SparseForcingPipeline, memory: MemoryConfig, changes: Sequence[PromptChange], config: ChangeBenchConfig
) -> dict:
    """One row of the table; `verdicts` are the judgements behind it, by clip and attribute, one for each change."""
    records: dict[str, list[Record]] = {clip: [] for clip in CLIPS}
    for first in range(0, len(changes), config.batch_size):
        began = time.perf_counter()
        batch = changes[first : first + config.batch_size]
        for clip, judged in judge_changes(pipe, memory, batch, first, config).items():
            records[clip] += judged
        print(f"  {first + len(batch)}/{len(changes)} changes, {time.perf_counter() - began:.0f} s", flush=True)
    verdicts = {clip: {name: [row[name] for row in judged] for name in ACCURACIES} for clip, judged in records.items()}
    for clip in CLIPS:
        verdicts[clip] |= split_by_change(records[clip], changes)
    return {
        "memory": dataclasses.asdict(memory),
        "accuracy": {clip: {name: share_of(v) for name, v in columns.items()} for clip, columns in verdicts.items()},
        "verdicts": verdicts,
    }


def judge_changes(
    pipe: SparseForcingPipeline,
    memory: MemoryConfig,
    changes: Sequence[PromptChange],
    first: int,
    config: ChangeBenchConfig,
) -> dict[str, list[Record]]:
    """Records of a batch of changes, the first of them number `first`, by what is judged."""
    clip = pipe.config.num_frames
    befores, afters = [change.before for change in changes], [change.after for change in changes]

    def frames(prompts: list[str], clips: int, prompt_changes: dict[int, list[str]] | None = None) -> np.ndarray:
        settings = RolloutSettings(
            horizons=(clips,), seed=config.seed, num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
        )  # fmt: skip
        chunks = stream(pipe, memory, prompts, first, settings, prompt_changes=prompt_changes)
        return np.concatenate([chunk.frames for chunk in chunks], 1)

    changed, unchanged = frames(befores, 3, {clip: afters}), frames(afters, 2)
    # What grows may have grown already, but not before it was told to.
    starts = [0 if change.attribute == "motion" else clip for change in changes]
    return {
        "before": [judge(video[:clip], prompt, 0) for video, prompt in zip(changed, befores)],
        "during": [judge(x[clip : 2 * clip], p, start) for x, p, start in zip(changed, afters, starts)],
        "after": [judge(x[2 * clip : 3 * clip], p, start + clip) for x, p, start in zip(changed, afters, starts)],
        "unchanged": [judge(x[clip : 2 * clip], prompt, clip) for x, prompt in zip(unchanged, afters)],
    }


def split_by_change(records: Sequence[Record], changes: Sequence[PromptChange]) -> dict[str, list[float | None]]:
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
        "| memory | before | 1st clip after | 2nd clip after | 95 % | what changed | all else | from the start |",
        "|" + "---|" * 8,
    ]
    for name, row in result["memories"].items():
        cells = row["accuracy"]
        low, high = cells["after"]["all"]["interval"] or (None, None)
        shares = [cells[clip]["all"]["mean"] for clip in ("before", "during", "after")]
        shares += [cells["after"][part]["mean"] for part in ("changed", "others")]
        texts = [percent(share) for share in shares]
        texts.insert(3, f"{percent(low)}-{percent(high)}")
        lines.append(f"| {name} | {' | '.join(texts)} | {percent(cells['unchanged']['all']['mean'])} |")
    return "\n".join(lines) + "\n"


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
            shares = (share_of([row["verdicts"]["after"][part][i] for i in own])["mean"] for part in ("changed", "all"))
            cells.append(" / ".join(map(percent, shares)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
