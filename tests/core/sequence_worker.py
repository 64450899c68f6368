"""One process of several for test_sequence_parallel.py.

First a video by the command line, by all processes together; then latents by the first two, three, ... of them, which
the first process compares with its own. Differences, relative to the largest latent, go to FOLDER/differences.json.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparse_forcing.cli import generate as command
from sparse_forcing.cli import main
from sparse_forcing.errors import ConfigError
from sparse_forcing.launch import join_launch
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.sequence_parallel import SequenceParallel
from sparse_forcing.sampling.pipeline import SparseForcingPipeline

PROMPT = "a small red circle moves right on a black background"
ARGUMENTS = ("generate", PROMPT, "--num-frames", "32", "--num-inference-steps", "2", "--json")
SPARSE = {"kind": "sparse", "window_frames": 4, "tile": (2, 2, 4), "persistent_blocks": 4, "density": 0.5}
WINDOW = {"kind": "window", "window_frames": 4}
HEAVY = {"kind": "heavy_hitter", "window_frames": 4, "tile": (2, 2, 4), "persistent_blocks": 2}
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("tiny", SPARSE, 3), ("tiny", SPARSE, 4),  # learned selectors; 6 heads on 4 are 2, 2, 1, 1
    ("tiny-base", SPARSE | {"retention": "mass"}, 2), ("tiny-base", WINDOW, 2), ("tiny-base", HEAVY, 4),
]  # fmt: skip


def generated(pipe: Any, memory: dict[str, Any], seed: int | None) -> tuple[torch.Tensor, int]:
    """[1, F, C, h, w] of a video of four chunks, and the cache's bytes; seed None: the pipeline draws one."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    arguments = {"num_frames": 32, "num_inference_steps": 2, "generator": generator}
    chunks = list(pipe.stream(PROMPT, memory=MemoryConfig(**memory), **arguments))
    return torch.cat([chunk.latents for chunk in chunks], 1), chunks[-1].cache_bytes


def compare(folder: Path) -> None:
    rank = dist.get_rank()
    pipes = {name: SparseForcingPipeline.from_pretrained(name) for name in ("tiny", "tiny-base")}
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3, 4)}
    found = []
    alone: dict[tuple[str, str], tuple[torch.Tensor, int]] = {}
    for name, memory, size in CASES:
        pipe, key = pipes[name], (name, memory["kind"])
        if rank == 0 and key not in alone:
            pipe.transformer.sequence_parallel = None
            alone[key] = generated(pipe, memory, 3)
        if rank < size:
            pipe.transformer.sequence_parallel = SequenceParallel(6, groups[size])
            latents, cache_bytes = generated(pipe, memory, 3)
            if rank == 0:
                expected, whole = alone[key]
                difference = float((latents - expected).abs().max() / expected.abs().max())
                found.append([name, memory["kind"], size, cache_bytes / whole, difference])
        dist.barrier()
    torch.manual_seed(rank)  # what each would draw by itself
    pipes["tiny-base"].transformer.sequence_parallel = SequenceParallel(6)
    drawn, _ = generated(pipes["tiny-base"], {"kind": "full"}, None)
    all_drawn = [torch.empty_like(drawn) for _ in range(dist.get_world_size())]
    dist.all_gather(all_drawn, drawn)
    found.append(["noise", "full", 4, 1 / 3, max(float((each - drawn).abs().max()) for each in all_drawn)])
    refused = 0
    for pass_ in (lambda: SequenceParallel(3), lambda: pass_with_gradients(pipes["tiny"])):
        try:
            pass_()
        except ConfigError:
            refused += 1
    if rank == 0:
        (folder / "differences.json").write_text(json.dumps({"found": found, "refused": refused}))


def pass_with_gradients(pipe: Any) -> Any:
    model = pipe.transformer
    model.sequence_parallel = SequenceParallel(6)
    return model(torch.zeros(1, 32, 2, 8, 8), torch.zeros(1), torch.zeros(1, 24, 128))


def run(folder: Path) -> int:
    """The command and the comparisons, in one group for all: a second one cannot be joined in a launch."""
    torch.set_num_threads(1)
    with join_launch(together=True) as launch:
        command.join_launch = lambda together: contextlib.nullcontext(launch)
        code = main([*ARGUMENTS, "--output", str(folder / "together"), "--sequence-parallel"])
        if code == 0:
            compare(folder)
    return code
