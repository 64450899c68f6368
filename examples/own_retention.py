"""A rule of your own for what persists, beside the paper's: one prompt and seed through both, judged by a program.

python examples/own_retention.py [--seconds N]
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from sparse_forcing import SparseForcingPipeline
from sparse_forcing.eval.scene_checker.caption import check_clip
from sparse_forcing.memory.retention import BlockView, RetentionRule, rule

PROMPT = "a large red circle orbits clockwise on a black background"


@rule("patient")  # from here on `memory.retention: patient` means this class
class PatientRule(RetentionRule):
    """Attention so far, halved with every chunk: a block survives a chunk that looks away."""

    reads = frozenset({"attention"})
    state_size = 1  # one number for each block, which moves along with it

    def observe(self, blocks: BlockView) -> Tensor:
        return blocks.state / 2 + blocks.attention[..., None]

    def scores(self, blocks: BlockView, capacity: int) -> Tensor:
        return blocks.state[..., 0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=20)
    options = parser.parse_args(arguments)

    pipe = SparseForcingPipeline.from_pretrained("tiny")
    for name in ("paper", "patient"):
        memory = replace(pipe.default_memory, retention=name)
        generator = torch.Generator().manual_seed(0)
        num_frames = round(options.seconds * pipe.fps)
        frames = pipe(PROMPT, num_frames=num_frames, memory=memory, generator=generator).frames[0]
        clip = torch.from_numpy((frames * 255).round().astype("uint8")).permute(0, 3, 1, 2)
        last = clip[-pipe.defaults.num_frames :]
        print(f"{name}: the last {len(last)} frames are {'right' if check_clip(last, PROMPT).all else 'wrong'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
