"""Long-horizon rollouts of the embedded model: caption accuracy, drift, speed and cache bytes of every memory.

One rollout per prompt and memory reaches the longest horizon; shorter horizons are judged on its earlier segments,
because a causal rollout's beginning does not depend on where it ends. All memories get the same noise, sampler and
positions unless their name says otherwise.

    sparse-forcing bench rollout --prompts 200 --horizons 1 4 12 --output docs/results/rollout
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sparse_forcing.config import to_plain
from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.bench_options import RolloutBenchConfig
from sparse_forcing.eval.metrics.caption import CaptionResult, accuracy, check_clip
from sparse_forcing.eval.metrics.picture import picture_statistics
from sparse_forcing.eval.statistics import summarize
from sparse_forcing.files import atomic_write_json, atomic_write_text, check_writable
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.pipeline import SparseForcingPipeline
from sparse_forcing.scenes.captions import caption
from sparse_forcing.scenes.sample import sample_scenes

if TYPE_CHECKING:
    from sparse_forcing.pipeline import VideoChunk

STATISTICS = ("brightness", "contrast", "saturation", "detail")


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
        "sparse-dense-window": change(default, kind="sparse", top_k=1.0),
        "heavy_hitter": change(default, kind="heavy_hitter"),
    }


@dataclass
class Segment:
    """Verdicts and picture statistics of one stretch of many rollouts."""

    verdicts: list[CaptionResult]
    statistics: list[dict[str, float]]


def run(config: RolloutBenchConfig) -> int:
    """Roll out every memory over the same prompts; writes rollout.json and rollout.md, prints JSON last."""
    out = check_writable(config.output, folder=True) if config.output else None
    pipe = SparseForcingPipeline.from_pretrained(config.model)
    variants = memory_variants(pipe.default_memory)
    unknown = set(config.memories) - set(variants)
    if unknown:
        raise ConfigError(f"memories: unknown {', '.join(sorted(unknown))}; known are {', '.join(variants)}")
    prompts = held_out_prompts(config)
    rows: dict[str, dict] = {}
    result = {"config": to_plain(config), "weights_sha256": pipe.weights_sha256, "memories": rows}
    for name in config.memories:
        row = measure_memory(pipe, variants[name], prompts, config)
        rows[name] = row
        print(f"{name}: " + json.dumps({h: row["horizons"][h]["accuracy"] for h in row["horizons"]}), flush=True)
        if out is not None:
            atomic_write_json(out / "rollout.json", result)
            atomic_write_text(out / "rollout.md", table(result))
    print(json.dumps(result))
    return 0


def held_out_prompts(config: RolloutBenchConfig) -> list[str]:
    """Captions in varied wording of scenes whose combination of attributes was never trained on."""
    generator = torch.Generator().manual_seed(config.seed)
    fraction = 0.0 if config.objects == 1 else 1.0
    scenes = sample_scenes(config.prompts, generator, two_object_fraction=fraction, split="heldout").scenes()
    words = random.Random(config.seed)
    return [caption(scene, words) for scene in scenes]


def measure_memory(
    pipe: SparseForcingPipeline, memory: MemoryConfig, prompts: list[str], config: RolloutBenchConfig
) -> dict:
    """One row of the table."""
    clip = pipe.config.num_frames
    segments = {horizon: Segment([], []) for horizon in config.horizons}
    seconds: list[list[float]] = []
    peak = {horizon: 0 for horizon in config.horizons}
    for first in range(0, len(prompts), config.batch_size):
        batch = prompts[first : first + config.batch_size]
        began = time.perf_counter()
        chunks = list(_stream(pipe, memory, batch, first, config))
        seconds.append([chunk.seconds / len(batch) for chunk in chunks])
        video = np.concatenate([chunk.frames for chunk in chunks], 1)
        for horizon, segment in segments.items():
            _judge(segment, video[:, (horizon - 1) * clip : horizon * clip], batch, (horizon - 1) * clip)
            used = [c.cache_bytes // len(batch) for c in chunks[: _chunks_until(chunks, horizon * clip)]]
            peak[horizon] = max(peak[horizon], *used)
        print(f"  {first + len(batch)}/{len(prompts)} rollouts, {time.perf_counter() - began:.0f} s", flush=True)
    per_chunk = np.median(np.array(seconds), 0)
    base = segments[min(config.horizons)]
    return {
        "memory": dataclasses.asdict(memory),
        "seconds_per_chunk_last": float(per_chunk[-1]),
        "horizons": {
            str(h): {
                "accuracy": accuracy(s.verdicts),
                "all_interval": _interval([float(v.all) for v in s.verdicts], prompts),
                "drift": {name: _drift(base, s, name) for name in STATISTICS},
                "cache_bytes_peak": int(peak[h]),
            }
            for h, s in segments.items()
        },
    }


def _stream(
    pipe: SparseForcingPipeline, memory: MemoryConfig, prompts: list[str], first: int, config: RolloutBenchConfig
) -> list[VideoChunk]:
    generators = [torch.Generator().manual_seed(config.seed * 100_003 + first + i) for i in range(len(prompts))]
    return list(
        pipe.stream(
            prompts,
            num_frames=max(config.horizons) * pipe.config.num_frames,
            memory=memory,
            generator=generators,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
        )
    )


def _chunks_until(chunks: list[VideoChunk], frames: int) -> int:
    """How many chunks it takes to cover `frames` pixel frames."""
    total = 0
    for number, chunk in enumerate(chunks, 1):
        total += chunk.frames.shape[1]
        if total >= frames:
            return number
    return len(chunks)


def _judge(segment: Segment, video: np.ndarray, prompts: list[str], start_frame: int) -> None:
    """Check and measure [B, F, H, W, 3] against their captions."""
    for frames, prompt in zip(video, prompts):
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2) * 2 - 1
        segment.verdicts.append(check_clip(pixels, prompt, start_frame=start_frame))
        rows = picture_statistics((frames * 255).round().astype(np.uint8)).mean(0)
        segment.statistics.append(dict(zip(STATISTICS, (float(x) for x in rows))))


def _interval(values: list[float], prompts: list[str]) -> tuple[float, float] | None:
    """Bootstrap 95 % interval of a mean, resampling prompts."""
    return summarize(values, [1.0] * len(values), prompts).interval


def _drift(base: Segment, late: Segment, name: str) -> float:
    """Mean absolute change of a picture statistic between the first and a later segment of the same rollout."""
    pairs = zip(base.statistics, late.statistics)
    return float(np.mean([abs(after[name] - before[name]) for before, after in pairs]))


def table(result: dict) -> str:
    """Markdown table of a result."""
    attributes = ("background", "colour", "shape", "size", "motion", "all")
    lines = [
        "| memory | horizon | " + " | ".join(attributes) + " | all, 95 % | detail drift | cache KiB |",
        "|" + "---|" * (len(attributes) + 5),
    ]
    for name, row in result["memories"].items():
        for horizon, cell in row["horizons"].items():
            shares = " | ".join(f"{100 * cell['accuracy'].get(a, float('nan')):.1f}" for a in attributes)
            low, high = cell["all_interval"] or (float("nan"),) * 2
            lines.append(
                f"| {name} | {horizon}x | {shares} | {100 * low:.1f}-{100 * high:.1f} | "
                f"{cell['drift']['detail']:.3f} | {cell['cache_bytes_peak'] / 1024:.0f} |"
            )
    return "\n".join(lines) + "\n"
