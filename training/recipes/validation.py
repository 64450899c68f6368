"""Sample videos of the present weights, at intervals, so that eyes can follow a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sparse_forcing.media.video import write_video
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.training.data.shards import StoredText
from sparse_forcing.training.engine.ema import ParameterEma
from sparse_forcing.training.engine.parallel import rank

PROMPTS = ("a red circle moves to the right on a white background", "a small blue square moves up")


@contextmanager
def averaged(pipe: SparseForcingPipeline, ema: ParameterEma | None) -> Iterator[None]:
    """The pipeline with averaged weights inside the block, with the trained ones after it."""
    if ema is None:
        yield
        return
    trained = {name: p.detach().clone() for name, p in pipe.transformer.named_parameters()}
    ema.copy_to(pipe.transformer)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in pipe.transformer.named_parameters():
                parameter.copy_(trained[name])


def write_samples(
    pipe: SparseForcingPipeline, ema: ParameterEma | None, step: int, folder: Path, *, memory: MemoryConfig, seed: int
) -> list[Path]:
    """One video per validation prompt, `folder/step-N-i.mp4`; every process takes part, the first one writes.

    Where the text encoder is a table of stored embeddings, the prompts are the first of those.
    """
    paths, text = [], pipe.text_encoder
    prompts = text.shards.prompts[: len(PROMPTS)] if isinstance(text, StoredText) else PROMPTS
    with averaged(pipe, ema):
        for number, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(seed + number)
            frames = pipe(prompt, memory=memory, generator=generator, output_type="np").frames[0]
            path = folder / f"step-{step:07d}-{number}.mp4"
            if rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                write_video(path, frames, fps=pipe.fps)
            paths.append(path)
    return paths
