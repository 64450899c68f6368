"""How much true attention a block selector keeps, on rollouts of prompts it was not trained on.

Recall is the share of dense attention mass inside the chosen window blocks. Three selectors look at the same queries
and keys: mean pooling, the model's learned selector, and an oracle that knows the mass.

    python -m sparse_forcing.eval.bench.selector MODEL [--prompts N or FILE] [--chunks N] [--seed N]
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.kernels.block_selection.interface import block_scores, pool_blocks
from sparse_forcing.memory import MemoryConfig, make_model_memory
from sparse_forcing.memory.base import WindowPass
from sparse_forcing.model.selector import BlockSelector, recall
from sparse_forcing.sampling.noise import SeededNoise
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.sampling.rollout import rollout
from sparse_forcing.scenes.held_out import held_out_prompts

SHARES = (0.0625, 0.125, 0.25)


class RecallMeter:
    """Collects recall [samples, H] per (selector, share, layer)."""

    def __init__(self, selectors: list[BlockSelector] | None) -> None:
        self.selectors = selectors
        self.found: dict[tuple[str, float, int], list[Tensor]] = defaultdict(list)

    def __call__(self, seen: WindowPass) -> None:
        if not seen.full:
            return
        query, key, sizes, mass = seen.queries, seen.keys, seen.key_sizes, seen.mass
        scores = {"mean": block_scores(pool_blocks(query), pool_blocks(key, sizes)), "oracle": mass}
        if self.selectors is not None:
            s = self.selectors[seen.layer]
            scores["learned"] = block_scores(
                pool_blocks(query, None, s.query_weights, s.query_projection),
                pool_blocks(key, sizes, s.key_weights, s.key_projection),
            )
        for share in SHARES:
            top_k = max(1, math.ceil(share * mass.shape[-1]))
            for name, value in scores.items():
                self.found[name, share, seen.layer].append(recall(value, mass, top_k))

    def means(self) -> dict[tuple[str, float], Tensor]:
        """[samples, layers, H] recall of each (selector, share), averaged over passes."""
        layers: dict[tuple[str, float], list[Tensor]] = defaultdict(list)
        for (name, share, _), passes in sorted(self.found.items()):
            layers[name, share].append(torch.stack(passes).mean(0))
        return {key: torch.stack(value, 1) for key, value in layers.items()}


def recall_table(means: dict[tuple[str, float], Tensor]) -> list[dict[str, Any]]:
    """Per share, for each selector: `mean` and `spread` (standard deviation) over layers and heads, `layers` [L][H],
    `prompts` [N]; and with a learned one `gap_closed`, its share of the way from the mean to the oracle."""
    rows = []
    for share in SHARES:
        row: dict[str, Any] = {"share": share}
        for name in sorted(name for name, s in means if s == share):
            value = means[name, share]
            heads = value.mean(0)
            row[name] = {
                "mean": heads.mean().item(),
                "spread": heads.std().item(),
                "layers": heads.tolist(),
                "prompts": value.mean((1, 2)).tolist(),
            }
        if "learned" in row:
            gap = row["oracle"]["mean"] - row["mean"]["mean"]
            row["gap_closed"] = (row["learned"]["mean"] - row["mean"]["mean"]) / gap if gap else None
        rows.append(row)
    return rows


@torch.no_grad()
def measure_recall(
    pipe: SparseForcingPipeline,
    prompts: list[str],
    *,
    chunks: int,
    seed: int = 0,
    memory: MemoryConfig | None = None,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Roll out `chunks` chunks per prompt through the sparse memory and compare selectors on what its layers see.

    Raises:
        ConfigError: the memory is not sparse, or its window never fills.
    """
    memory = memory or pipe.default_memory
    if memory.kind != "sparse":
        raise ConfigError(f"memory.kind: recall is measured on a sparse memory, got {memory.kind!r}")
    if chunks * pipe.geometry.chunk_frames < memory.window_frames:
        raise ConfigError(f"chunks: {chunks} do not fill a window of {memory.window_frames} latent frames")
    parts: dict[tuple[str, float], list[Tensor]] = defaultdict(list)
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        for key, value in _observe(pipe, batch, memory, chunks, seed + first).items():
            parts[key].append(value)
    return recall_table({key: torch.cat(value) for key, value in parts.items()})


def _observe(
    pipe: SparseForcingPipeline, prompts: list[str], memory: MemoryConfig, chunks: int, seed: int
) -> dict[tuple[str, float], Tensor]:
    """Recall on the rollouts of one batch; guidance's second half of a doubled batch does not count."""
    height, width = pipe.geometry.latent_size(pipe.defaults.height, pipe.defaults.width)
    shape = (pipe.autoencoder.latent_channels, height, width)
    text = pipe.encode_prompt(prompts)
    state = make_model_memory(pipe.transformer, memory, torch.zeros(len(text), 0, *shape))
    meter = RecallMeter(pipe.transformer.selectors)
    state.observe_window(meter)
    noise = SeededNoise(
        [torch.Generator().manual_seed(seed + i) for i in range(len(text))], shape, pipe.device, pipe.dtype
    )
    sampler, unconditional = pipe.defaults.sampler, None
    if sampler.guidance_scale != 1:
        unconditional = pipe.text.encode([pipe.defaults.negative_prompt] * len(text))
    sizes = [pipe.geometry.chunk_frames] * chunks
    for _ in rollout(pipe.transformer, text, sizes, state, noise, sampler, unconditional_text=unconditional):
        pass
    return {key: value[: len(prompts)] for key, value in meter.means().items()}


def main() -> None:
    from sparse_forcing.sampling.generation.prompts import read_prompts

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", default="32", help="how many held-out scenes, or a file")
    parser.add_argument("--chunks", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    number = args.prompts.isdigit()
    prompts = held_out_prompts(int(args.prompts), seed=args.seed) if number else read_prompts(args.prompts)
    pipe = SparseForcingPipeline.from_pretrained(args.model)
    print(json.dumps(measure_recall(pipe, prompts, chunks=args.chunks, seed=args.seed)))


if __name__ == "__main__":
    main()
