"""How much true attention a block selector keeps, on rollouts of prompts it was not trained on.

Recall is the share of dense attention mass inside the chosen window blocks. Three selectors look at the same queries
and keys: mean pooling, the model's learned selector, and an oracle that knows the mass.

    python -m sparse_forcing.training.recall MODEL [--prompts FILE] [--chunks N] [--seed N]
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.kernels.block_selection.interface import block_scores, pool_blocks
from sparse_forcing.memory import MemoryConfig, SparseMemory
from sparse_forcing.pipeline import SparseForcingPipeline
from sparse_forcing.sampling.rollout import SeededNoise, rollout
from sparse_forcing.selector import BlockSelector, recall
from sparse_forcing.training.stage import memory_of

SHARES = (0.0625, 0.125, 0.25)
HELD_OUT = ("a large green square moves left on a black background", "a small yellow circle moves down")


class RecallMeter:
    """Collects recall [samples, H] per (selector, share, layer)."""

    def __init__(self, selectors: list[BlockSelector] | None, blocks: int) -> None:
        self.selectors, self.blocks = selectors, blocks
        self.found: dict[tuple[str, float, int], list[Tensor]] = defaultdict(list)

    def __call__(self, layer: int, query: Tensor, key: Tensor, sizes: Tensor | None, mass: Tensor) -> None:
        scores = {"mean": block_scores(pool_blocks(query), pool_blocks(key, sizes)), "oracle": mass}
        if self.selectors is not None:
            s = self.selectors[layer]
            scores["learned"] = block_scores(
                pool_blocks(query, None, s.query_weights, s.query_projection),
                pool_blocks(key, sizes, s.key_weights, s.key_projection),
            )
        if mass.shape[-1] < self.blocks:
            return  # the window is not full yet
        for share in SHARES:
            top_k = max(1, math.ceil(share * self.blocks))
            for name, value in scores.items():
                self.found[name, share, layer].append(recall(value, mass, top_k))

    def table(self) -> list[dict[str, Any]]:
        """Per share: mean and spread over layers and heads of each selector, and how much of the gap is closed."""
        rows = []
        for share in SHARES:
            names = sorted({name for name, s, _ in self.found if s == share})
            means = {
                name: torch.stack(
                    [torch.cat(v).mean(0) for (n, s, _), v in sorted(self.found.items()) if (n, s) == (name, share)]
                )
                for name in names
            }
            row: dict[str, Any] = {"share": share}
            for name, value in means.items():
                row[name] = {"mean": value.mean().item(), "spread": value.std().item(), "layers": value.tolist()}
            if "learned" in means:
                gap = means["oracle"].mean() - means["mean"].mean()
                row["gap_closed"] = ((means["learned"].mean() - means["mean"].mean()) / gap).item()
            rows.append(row)
        return rows


@torch.no_grad()
def measure_recall(
    pipe: SparseForcingPipeline, prompts: list[str], *, chunks: int, seed: int = 0, memory: MemoryConfig | None = None
) -> list[dict[str, Any]]:
    """Roll out `chunks` chunks per prompt through the sparse memory and compare selectors on what its layers see.

    Raises:
        ConfigError: the memory is not sparse.
    """
    memory = memory or pipe.default_memory
    height, width = pipe.geometry.latent_size(pipe.config.height, pipe.config.width)
    shape = (pipe.vae.latent_channels, height, width)
    text = pipe.encode_prompt(prompts)
    state = memory_of(pipe.transformer, memory, torch.zeros(len(text), 0, *shape))
    if not isinstance(state, SparseMemory):
        raise ConfigError(f"memory.kind: recall is measured on a sparse memory, got {memory.kind!r}")
    state.observer = meter = RecallMeter(pipe.transformer.selectors, state.window_capacity)
    noise = SeededNoise(
        [torch.Generator().manual_seed(seed + i) for i in range(len(text))], shape, pipe.device, pipe.dtype
    )
    sampler, unconditional = pipe.config.sampler, None
    if sampler.guidance_scale != 1:
        unconditional = pipe.text_encoder.encode([pipe.config.negative_prompt] * len(text))
    sizes = [pipe.geometry.chunk_frames] * chunks
    for _ in rollout(pipe.transformer, text, sizes, state, noise, sampler, unconditional_text=unconditional):
        pass
    return meter.table()


def main() -> None:
    from sparse_forcing.prompts import read_prompts

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--chunks", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    prompts = read_prompts(args.prompts) if args.prompts else list(HELD_OUT)
    pipe = SparseForcingPipeline.from_pretrained(args.model)
    print(json.dumps(measure_recall(pipe, prompts, chunks=args.chunks, seed=args.seed)))


if __name__ == "__main__":
    main()
