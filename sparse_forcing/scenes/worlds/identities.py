"""Which objects a world holds, and which (colour, shape) pairs training never sees come back."""

from __future__ import annotations

import random
from collections.abc import Sequence

from sparse_forcing.scenes.vocabulary import COLOURS, SHAPES, SIZE_JITTER, SIZES
from sparse_forcing.scenes.worlds.world import Identity


def is_held_out_pair(colour: str, shape: str) -> bool:
    """Whether a pair is kept out of training: of every colour one shape, of every shape one or two colours."""
    return (COLOURS.index(colour) + 2 * SHAPES.index(shape)) % len(SHAPES) == 0


def draw_identities(
    rng: random.Random, split: str, count: int, *, returning: Sequence[int], sizes: Sequence[str] = SIZES
) -> list[Identity]:
    """``count`` objects, no two of the same colour and shape; those numbered in ``returning`` are of the split.

    Objects that never return are of the training pairs, except where the split is "all".
    """
    found: list[Identity] = []
    while len(found) < count:
        held_out = None if split == "all" else split == "heldout" and len(found) in returning
        colour = rng.choice(COLOURS)
        shapes = [shape for shape in SHAPES if held_out in (None, is_held_out_pair(colour, shape))]
        shape, size = rng.choice(shapes), rng.choice(sizes)
        scale = rng.uniform(1 - SIZE_JITTER, 1 + SIZE_JITTER)
        if all((colour, shape) != (other.colour, other.shape) for other in found):
            found.append(Identity(colour=colour, shape=shape, size=size, scale=scale))
    return found
