"""Sample videos of the present weights, written at intervals: how a run goes, to be watched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from sparse_forcing.media.video import write_video
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.processes import rank
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.training.data.shards import StoredText
from sparse_forcing.training.engine.ema import ParameterEma

PROMPTS = ("a red circle moves to the right on a white background", "a small blue square moves up")


@contextmanager
def swap_in_average(module: nn.Module, ema: ParameterEma) -> Iterator[None]:
    """Put the averaged weights into a module for the block, and the trained ones back after it; `ema` holds those
    meanwhile."""
    ema.exchange(module)
    try:
        yield
    finally:
        ema.exchange(module)


@contextmanager
def switch_to_eval(module: nn.Module) -> Iterator[None]:
    """Switch a module to evaluation for the block, and every submodule back to what it was after it."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def write_samples(
    pipe: SparseForcingPipeline, step: int, folder: Path, *, memory: MemoryConfig, seed: int
) -> list[Path]:
    """One video per validation prompt, `folder/step-N-i.mp4`; every process takes part, the first one writes.

    Where the text encoder is a table of stored embeddings, the prompts are the first of those.
    """
    paths, text = [], pipe.text
    prompts = text.shards.prompts[: len(PROMPTS)] if isinstance(text, StoredText) else PROMPTS
    for number, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed + number)
        frames = pipe(prompt, memory=memory, generator=generator, output_type="np").frames[0]
        path = sample_path(folder, step, number)
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_video(path, frames, fps=pipe.fps)
        paths.append(path)
    return paths


def sample_path(folder: Path, step: int, number: int) -> Path:
    """Where the sample of a step's `number`-th prompt or clip is written."""
    return folder / f"step-{step:07d}-{number}.mp4"
