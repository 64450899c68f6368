"""Rollouts judged at several horizons: caption verdicts, picture statistics and cache bytes, kept prompt by prompt.

One rollout per prompt reaches the longest horizon; shorter horizons are judged on its earlier segments, because a
causal rollout's beginning does not depend on where it ends. A horizon is a multiple of the model's default clip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from einops import rearrange

from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.measuring.statistics import LEVEL, summarize
from sparse_forcing.eval.metrics.offline.picture import NAMES, picture_statistics
from sparse_forcing.eval.scene_checker.caption import ATTRIBUTES, check_clip
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.sampling.arguments import PromptChanges
from sparse_forcing.sampling.decoding import VideoChunk
from sparse_forcing.sampling.pipeline import SparseForcingPipeline

ACCURACIES = (*ATTRIBUTES, "attributes", "all")
"""What is right: each attribute, the share of the stated ones, everything the caption says."""

DRIFTS = (*NAMES, "mean")
"""What changes: each picture statistic, and the mean over them."""

Measurements = dict[str, float | None]
"""One prompt at one horizon: ACCURACIES (None: the caption does not say) and NAMES."""


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How far, how large (pixels to the side) and from what noise; settings are the model's own where None."""

    horizons: tuple[int, ...] = (1, 4, 12)
    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if not self.horizons or min(self.horizons) < 1 or len(set(self.horizons)) < len(self.horizons):
            raise ConfigError(f"horizons: expected different positive multiples of the clip, got {self.horizons}")


@dataclass(frozen=True, kw_only=True)
class JudgedBatch:
    """Prompts rolled out together.

    records: per horizon, one for each prompt; seconds (of the model) and cache_bytes: per chunk and prompt;
    frames: [B, horizons, H, W, 3] uint8, the middle frame of every segment.
    """

    prompts: list[str]
    records: dict[int, list[Measurements]]
    seconds: list[float]
    cache_bytes: list[int]
    frames: np.ndarray


def stream(
    pipe: SparseForcingPipeline,
    memory: MemoryConfig,
    prompts: list[str],
    first: int,
    settings: RolloutSettings,
    *,
    prompt_changes: PromptChanges | None = None,
    recache: bool = False,
) -> Iterator[VideoChunk]:
    """The rollout of prompts number `first`, `first` + 1, ...: noise depends on a prompt's number alone."""
    return pipe.stream(
        prompts,
        height=settings.size,
        width=settings.size,
        num_frames=max(settings.horizons) * pipe.defaults.num_frames,
        memory=memory,
        prompt_changes=prompt_changes,
        recache=recache,
        generator=[torch.Generator().manual_seed(settings.seed * 100_003 + first + i) for i in range(len(prompts))],
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
    )


def judge_batch(
    pipe: SparseForcingPipeline, memory: MemoryConfig, prompts: list[str], first: int, settings: RolloutSettings
) -> JudgedBatch:
    """Roll out and judge a batch. Only the judged segments are kept while it runs."""
    clip, at = pipe.defaults.num_frames, 0
    pieces: dict[int, list[np.ndarray]] = {horizon: [] for horizon in settings.horizons}
    seconds, cache_bytes = [], []
    for chunk in stream(pipe, memory, prompts, first, settings):
        for horizon, piece in pieces.items():
            start = (horizon - 1) * clip
            piece.append(chunk.frames[:, max(start - at, 0) : max(start + clip - at, 0)])
        at += chunk.frames.shape[1]
        seconds.append(chunk.seconds / len(prompts))
        cache_bytes.append(chunk.cache_bytes // len(prompts))
    segments = {horizon: np.concatenate(piece, 1) for horizon, piece in pieces.items()}
    return JudgedBatch(
        prompts=prompts,
        records={
            horizon: [judge(frames, prompt, (horizon - 1) * clip) for frames, prompt in zip(video, prompts)]
            for horizon, video in segments.items()
        },
        seconds=seconds,
        cache_bytes=cache_bytes,
        frames=np.stack([_bytes(video[:, video.shape[1] // 2]) for video in segments.values()], 1),
    )


def judge(frames: np.ndarray, prompt: str, start_frame: int) -> Measurements:
    """Verdicts and statistics of one segment [F, H, W, 3] in [0, 1] that begins at `start_frame` of its video."""
    pixels = rearrange(torch.from_numpy(frames), "f h w c -> f c h w") * 2 - 1
    result = check_clip(pixels, prompt, start_frame=start_frame)
    verdicts = {name: result.verdict(name) for name in ATTRIBUTES}
    record: Measurements = {name: None if right is None else float(right) for name, right in verdicts.items()}
    stated = [float(right) for right in verdicts.values() if right is not None]
    record |= {"attributes": sum(stated) / len(stated), "all": float(result.all)}
    statistics = picture_statistics(_bytes(frames)).mean(0)
    return record | dict(zip(NAMES, (float(value) for value in statistics)))


def chunks_until(pipe: SparseForcingPipeline, horizon: int) -> int:
    """Chunks that a video of `horizon` clips is made of."""
    return len(pipe.geometry.chunks(pipe.geometry.latent_frames(horizon * pipe.defaults.num_frames)))


def summarize_rollouts(pipe: SparseForcingPipeline, batches: Sequence[JudgedBatch]) -> dict[str, Any]:
    """Means with 95 % intervals of every horizon, and the cache.

    Drift is the absolute change of a picture statistic since the shortest horizon of the same rollout, as a share of
    full scale.
    """
    horizons = sorted(batches[0].records)
    prompts = [prompt for batch in batches for prompt in batch.prompts]
    records = {horizon: [r for batch in batches for r in batch.records[horizon]] for horizon in horizons}
    bytes_at = list(accumulate(batches[0].cache_bytes, max))
    return {
        "prompts": len(prompts),
        "horizons": {
            str(horizon): {
                "accuracy": {name: summarize_verdicts([r[name] for r in records[horizon]]) for name in ACCURACIES},
                "drift": {
                    name: summarize_values(drift(records[horizons[0]], records[horizon], name)) for name in DRIFTS
                },
                "cache_bytes_peak": bytes_at[chunks_until(pipe, horizon) - 1],
            }
            for horizon in horizons
        },
        "cache_bytes": batches[0].cache_bytes,
        "seconds_per_chunk": np.median([batch.seconds for batch in batches], 0).tolist(),
    }


def drift(first: Sequence[Measurements], late: Sequence[Measurements], name: str) -> list[float]:
    """Per prompt, the absolute change of a statistic, or of all of them on average ("mean")."""
    names = NAMES if name == "mean" else (name,)
    changes = [[abs(_require(b[n]) - _require(a[n])) for n in names] for a, b in zip(first, late)]
    return [sum(row) / len(row) for row in changes]


def summarize_values(values: Sequence[float]) -> dict[str, Any]:
    """Mean, its bootstrap 95 % interval over prompts (None with fewer than two), and over how many it is taken."""
    found = summarize(values, [1.0] * len(values), range(len(values)))
    return {
        "mean": found.video_mean,
        "interval": found.interval and list(found.interval),
        "prompts": len(values),
    }


def summarize_verdicts(verdicts: Sequence[float | None]) -> dict[str, Any]:
    """Mean and interval of what is right, in [0, 1], over the prompts that speak of it (mean None: none does)."""
    known = [verdict for verdict in verdicts if verdict is not None]
    if not known:
        return {"mean": None, "interval": None, "prompts": 0}
    found = summarize_values(known)
    if len(known) > 1 and set(known) in ({0.0}, {1.0}):
        # Resampling equal verdicts gives no width, however few they are: the exact binomial bound takes its place
        # (Clopper & Pearson, Biometrika 26, 1934).
        bound = ((1 - LEVEL) / 2) ** (1 / len(known))
        found["interval"] = [0.0, 1 - bound] if known[0] == 0 else [bound, 1.0]
    return found


def _require(value: float | None) -> float:
    assert value is not None, "picture statistics are always measured"
    return value


def _bytes(frames: np.ndarray) -> np.ndarray:
    return (frames * 255).round().astype(np.uint8)
