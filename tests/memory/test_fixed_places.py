"""A memory that is written in place stays where it is: passes of steady chunks are the same calls on its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from sparse_forcing.kernels.values import checked_values
from sparse_forcing.memory import MemoryConfig, RolloutMemory
from tests.memory.conftest import CHANNELS, CHUNK, COLS, ROWS, Rollout

STEADY, LAST = 4, 12  # chunks, counted from 1
SPARSE = {"tile": (3, 2, 3), "density": 0.5, "persistent_blocks": 3}
CONFIGS = {
    "window": MemoryConfig(kind="window"),
    "sink": MemoryConfig(kind="sink"),
    "heavy_hitter": MemoryConfig(kind="heavy_hitter", **SPARSE),
    "sparse": MemoryConfig(**SPARSE),
    "mass": MemoryConfig(retention="mass", **SPARSE),
    "ragged": MemoryConfig(**SPARSE | {"tile": (3, 3, 4)}),
    "absolute": MemoryConfig(positions="absolute", **SPARSE),
}


def tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that a memory holds, however deep, but for what depends on its geometry alone."""
    if isinstance(value, Tensor):
        yield value
    elif id(value) in seen:
        return
    elif isinstance(value, list | tuple):
        seen.add(id(value))
        for part in value:
            yield from tensors(part, seen)
    elif type(value).__module__.startswith("sparse_forcing.memory"):
        seen.add(id(value))
        for part in vars(value).values():
            yield from tensors(part, seen)


def addresses(memory: RolloutMemory) -> list[int]:
    return [x.data_ptr() for x in tensors(memory, set())]


def steady(run: Rollout, config: MemoryConfig, horizon: int = 6) -> tuple[RolloutMemory, Any]:
    """A memory at its steady state and a function that makes any pass over (noisy latents, timestep)."""
    memory = run.make(config, horizon=horizon, selectors=run.model.selectors)
    text = run.model.encode_text(run.text)

    def over(x: Tensor, timestep: Tensor, clean: bool = False) -> Tensor:
        policy = memory.clean_pass() if clean else memory.denoising_pass()
        return run.model(x, timestep, run.text, policy=policy, text_keys_values=text)

    return memory, over


def same(found: Tensor | None, expected: Tensor | None, clean: bool) -> bool:
    """Whether two passes gave the same, bit for bit; a clean pass gives nothing."""
    if clean:
        return found is None and expected is None
    return found is not None and expected is not None and torch.equal(found, expected)


def latents(chunk: int) -> Tensor:
    return torch.randn(
        2, CHANNELS, CHUNK, 2 * ROWS, 2 * COLS, dtype=torch.float64, generator=torch.Generator().manual_seed(chunk)
    )


@pytest.mark.parametrize("name", [*CONFIGS, "learned selector"])
@torch.no_grad()
def test_no_tensor_of_a_steady_memory_moves(run: Rollout, name: str) -> None:
    if name == "learned selector":
        run, name = Rollout(selector_tokens=18), "sparse"
    memory, over = steady(run, CONFIGS[name])
    places, shapes = [], []
    for chunk in range(1, LAST + 1):
        memory.begin_chunk(CHUNK)
        over(latents(chunk), torch.full((2,), 500.0))
        over(latents(-chunk), torch.zeros(2), clean=True)
        places.append(addresses(memory))
        shapes.append(memory.shapes)
    assert len(places[-1]) >= 4 * run.model.config.num_layers / 2
    assert all(place == places[STEADY - 1] for place in places[STEADY - 1 :])
    assert all(shape == shapes[STEADY - 1] for shape in shapes[STEADY - 1 :])
    assert shapes[-1] is not None
    assert shapes[0] != shapes[-1], "the first chunk has no past"


@pytest.mark.parametrize(
    "name",
    ["window", "sparse", *(pytest.param(x, marks=pytest.mark.slow) for x in CONFIGS if x not in ("window", "sparse"))],
)
@torch.no_grad()
def test_recorded_passes_of_a_steady_chunk_are_those_of_the_next_ones(run: Rollout, name: str) -> None:
    """Bitwise: a pass is recorded as a graph of calls and replayed for later chunks, without any Python of ours."""
    memory, over = steady(run, CONFIGS[name])
    eager_memory, eager_over = steady(run, CONFIGS[name])
    recorded: dict[bool, Any] = {}
    for chunk in range(1, LAST + 1):
        memory.begin_chunk(CHUNK)
        eager_memory.begin_chunk(CHUNK)
        for clean in (False, True):
            inputs = latents(chunk), torch.full((2,), 0.0 if clean else 500.0)
            expected = eager_over(*inputs, clean)
            if chunk < STEADY:
                found = over(*inputs, clean)
            else:
                if chunk == STEADY:
                    with checked_values(on=False):
                        before = [x.clone() for x in tensors(memory, set())]
                        recorded[clean] = make_fx(partial(over, clean=clean))(*inputs)
                    for x, old in zip(tensors(memory, set()), before):
                        x.copy_(old)  # recording ran it once
                found = recorded[clean](*inputs)
            assert same(found, expected, clean), (chunk, clean)
    for found, expected in zip(tensors(memory, set()), tensors(eager_memory, set())):
        assert torch.equal(found, expected)
