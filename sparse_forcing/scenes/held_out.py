"""Prompts to judge the embedded model by: captions of scenes whose combination of attributes was never trained on."""

from __future__ import annotations

import random

import torch

from sparse_forcing.scenes.captions import caption
from sparse_forcing.scenes.sample import sample_scenes


def held_out_prompts(count: int, *, seed: int = 0, objects: int = 1) -> list[str]:
    """`count` captions in varied wording of held-out scenes with one or two objects; more begin with the same."""
    generator, words = torch.Generator().manual_seed(seed), random.Random(seed)
    batches = (
        sample_scenes(1, generator, two_object_fraction=objects - 1.0, split="heldout").scenes() for _ in range(count)
    )
    return [caption(scene, words) for (scene,) in batches]
