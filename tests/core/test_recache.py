"""The window's keys computed anew when the prompt changes: what a rollout would have that began with the new prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory import MemoryConfig, RolloutMemory
from sparse_forcing.memory.build import make_model_memory
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.sampling.noise import GivenNoise, SeededNoise
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.sampling.rollout import rollout
from tests.training.conftest import make_pipeline

TILED: dict[str, Any] = {"kind": "sparse", "tile": (2, 2, 2), "persistent_blocks": 1, "density": 0.5}
MEMORIES = {
    "window": MemoryConfig(kind="window", window_frames=6),
    "window and a part of a chunk": MemoryConfig(kind="window", window_frames=7),
    "sink": MemoryConfig(kind="sink", window_frames=8, sink_frames=2),
    "a part of a chunk as sink": MemoryConfig(kind="sink", window_frames=7, sink_frames=1),
    "sparse": MemoryConfig(**TILED, window_frames=6),
    "8 bits": MemoryConfig(**TILED, window_frames=6, cache_dtype="int8"),
    "accumulated": MemoryConfig(**TILED, window_frames=6, retention="accumulated"),
}
each_memory = pytest.mark.parametrize("memory", MEMORIES)


@pytest.fixture(scope="module", params=[{}, {"selector_tokens": 8}], ids=["plain", "selector"])
def pipe(request: pytest.FixtureRequest) -> SparseForcingPipeline:
    return make_pipeline(**request.param)


def latents_of(
    pipe: SparseForcingPipeline,
    config: MemoryConfig,
    prompt: str,
    count: int,
    *,
    first: int = 0,
    changes: dict[int, str] | None = None,
    **arguments: Any,
) -> tuple[list[Tensor], RolloutMemory]:
    """Chunks number `first` to `first + count` of noise that depends on a chunk's number alone, and the memory."""
    noise = torch.randn(1, 40, 6, 4, 4, generator=torch.Generator().manual_seed(5))[:, 2 * first :]
    texts = {number: pipe.encode_prompt([text]) for number, text in (changes or {}).items()}
    source = GivenNoise(noise, SeededNoise([torch.Generator()], (6, 4, 4), torch.device("cpu"), torch.float32))
    memory = make_model_memory(pipe.transformer, config, noise)
    parts = rollout(
        pipe.transformer,
        pipe.encode_prompt([prompt]),
        [2] * count,
        memory,
        source,
        SamplerConfig(kind="euler", steps=2),
        text_at=texts.get,
        **arguments,
    )
    return [part.latents for part in parts], memory


@pytest.mark.parametrize("memory", [name for name in MEMORIES if "sink" not in name])
def test_it_is_as_if_the_window_had_been_given_with_the_new_prompt(pipe: SparseForcingPipeline, memory: str) -> None:
    found, _ = latents_of(pipe, MEMORIES[memory], "a red circle", 3, changes={2: "a blue star"}, recache=True)
    kept, _ = latents_of(pipe, MEMORIES[memory], "a red circle", 3, changes={2: "a blue star"})
    given, _ = latents_of(pipe, MEMORIES[memory], "a blue star", 1, first=2, initial_latents=found[:2])
    assert torch.equal(found[2], given[0])
    assert not torch.equal(found[2], kept[2])


@each_memory
def test_the_same_prompt_changes_nothing_while_the_window_holds_everything(
    pipe: SparseForcingPipeline, memory: str
) -> None:
    plain, _ = latents_of(pipe, MEMORIES[memory], "a red circle", 4)
    again, _ = latents_of(pipe, MEMORIES[memory], "a red circle", 4, changes={2: "a red circle"}, recache=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


@each_memory
@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_long_after_the_window_was_full_everything_stays_in_its_place(
    pipe: SparseForcingPipeline, memory: str, positions: str
) -> None:
    from dataclasses import replace

    config = replace(MEMORIES[memory], positions=positions)
    plain, before = latents_of(pipe, config, "a red circle", 9)
    again, after = latents_of(pipe, config, "a red circle", 9, changes={8: "a blue star"}, recache=True)
    assert all(torch.equal(a, b) for a, b in zip(plain[:8], again[:8]))
    assert not torch.equal(plain[8], again[8])
    states = [each.state_dict() for each in (before, after)]
    layers = [state.pop("layers", None) for state in states]
    for name in set(states[0]) - {"keys", "values"}:
        assert states[0][name] == states[1][name], name
    for name in ("position", "floor") if layers[0] else ():  # which blocks persist was asked anew
        assert torch.equal(layers[0][name].sort(-1)[0], layers[1][name].sort(-1)[0]), name


def test_other_memories_are_refused(pipe: SparseForcingPipeline) -> None:
    for config in (MemoryConfig(kind="full"), MemoryConfig(kind="heavy_hitter")):
        with pytest.raises(ConfigError, match=f"window of a {config.kind} memory cannot be written again"):
            pipe.stream("a red circle", memory=config, recache=True)
