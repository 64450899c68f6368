"""What inference on a CPU does in fewer calls gives what the definition does, and training goes on after it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_forcing.kernels.block_sparse_attention.cpu import small
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.memory.sparse import SparseMemory
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model.joined import JoinedWeights
from sparse_forcing.model.layers import RMSNorm
from sparse_forcing.sampling.noise import SeededNoise
from sparse_forcing.sampling.rollout import rollout
from tests.memory.conftest import CHANNELS, CHUNK, COLS, ROWS, Rollout

SPARSE = {"tile": (3, 2, 3), "density": 0.5, "persistent_blocks": 3}
CHUNKS = (CHUNK,) * 6


def video(
    run: Rollout,
    memory: SparseMemory,
    dtype: torch.dtype = torch.float64,
    chunks: tuple[int, ...] = CHUNKS,
    **changes: Any,
) -> Tensor:
    noise = SeededNoise(
        [torch.Generator().manual_seed(seed) for seed in (1, 2)],
        (CHANNELS, 2 * ROWS, 2 * COLS),
        torch.device("cpu"),
        dtype,
    )
    sampler = SamplerConfig(steps=2)
    parts = rollout(run.model, run.text.to(dtype), list(chunks), memory, noise, sampler, **changes)
    return torch.cat([part.latents for part in parts], 1)


@pytest.mark.parametrize("retention", ["paper", "mass", "accumulated"])
@torch.no_grad()
def test_blocks_chosen_in_few_calls_are_those_of_the_definition(retention: str) -> None:
    run, found, steady = Rollout(selector_tokens=18), [], []
    for few in (True, False):
        memory = run.make(MemoryConfig(retention=retention, **SPARSE), horizon=6, selectors=run.model.selectors)
        assert isinstance(memory, SparseMemory)
        if not few:
            memory.fixed = None
        found.append(video(run, memory))
        steady.append(memory._all is not None and memory._all.favour is not None)
    assert steady == [True, False]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_after_a_change_of_prompt_they_are_those_of_the_definition() -> None:
    run, found = Rollout(selector_tokens=18), []
    texts = {4: run.text.flip(1)}
    for few in (True, False):
        memory = run.make(MemoryConfig(window_frames=9, **SPARSE), horizon=9, selectors=run.model.selectors)
        assert isinstance(memory, SparseMemory)
        if not few:
            memory.fixed = None
        found.append(video(run, memory, text_at=texts.get, recache=True))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("tile", "chunks"),
    [((3, 2, 3), (1, *CHUNKS)), ((1, 2, 3), (*(1,) * 9, *CHUNKS))],
    ids=["first", "many"],
)
@torch.no_grad()
def test_with_short_chunks_they_are_those_of_the_definition(
    tile: tuple[int, int, int], chunks: tuple[int, ...]
) -> None:
    run, found = Rollout(selector_tokens=math.prod(tile)), []
    run.model.float()
    for few in (True, False):
        memory = run.make(MemoryConfig(**SPARSE | {"tile": tile}), horizon=6, selectors=run.model.selectors)
        assert isinstance(memory, SparseMemory)
        if not few:
            memory.fixed = None
        found.append(video(run, memory, torch.float32, chunks))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_joined_products_and_small_attention_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Rollout(selector_tokens=18)
    run.model.float()
    config, found = MemoryConfig(**SPARSE), []
    for plain in (True, False):
        if plain:
            monkeypatch.setattr(JoinedWeights, "of", lambda *_: None)
            monkeypatch.setattr(small, "GATHERED_BYTES", 0)
        else:
            monkeypatch.undo()
        found.append(video(run, run.make(config, horizon=6, selectors=run.model.selectors), torch.float32))
    assert run.model.blocks[0].attn1._together is not None
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def test_large_weights_stay_where_the_file_is_mapped() -> None:
    norm = RMSNorm(1024, 1e-6)
    few, many = (tuple(torch.nn.Linear(1024, rows) for _ in range(3)) for rows in (512, 513))
    assert JoinedWeights.of(few, (norm,)) is not None
    assert JoinedWeights.of(many, (norm,)) is None


def test_training_follows_inference_in_one_process() -> None:
    run = Rollout(selector_tokens=18)
    run.model.float()
    found = video(run, run.make(MemoryConfig(**SPARSE), horizon=6, selectors=run.model.selectors), torch.float32)
    assert not found.is_inference()
    weights = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    run.model.requires_grad_(True)
    x = found[:, :CHUNK].transpose(1, 2)
    run.model(x, torch.full((2,), 500.0), run.text.float()).square().mean().backward()
    assert run.model.blocks[0].attn1.to_k.weight.grad is not None
    with torch.no_grad():
        run.model.blocks[0].attn1.to_k.weight.add_(1)  # as an optimizer does
    assert torch.equal(run.model.state_dict()["blocks.0.attn1.to_q.weight"], weights["blocks.0.attn1.to_q.weight"])


def test_layers_that_are_more_than_their_weights_are_called_themselves() -> None:
    run = Rollout(selector_tokens=18)
    attention = run.model.float().blocks[0].attn1
    memory = run.make(MemoryConfig(**SPARSE), horizon=6)
    memory.begin_chunk(CHUNK)
    table = memory.rotary(attention.norm_q.weight.numel() // attention.heads, torch.float32, torch.device("cpu"))
    x = torch.randn(1, CHUNK * ROWS * COLS, attention.to_q.in_features)

    def project() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return attention.project(x, table)

    before, called = project(), []
    assert attention._together is not None
    hook = attention.to_v.register_forward_hook(lambda *_: called.append(1))
    after = project()
    hook.remove()
    assert called
    for mine, exact in zip(before, after):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)
    doubled = {name: 2 * weight for name, weight in attention.to_v.state_dict().items()}
    attention.to_v.load_state_dict(doubled)
    torch.testing.assert_close(project()[2], 2 * before[2])
    attention.to_v = torch.nn.Linear(x.shape[-1], x.shape[-1])
    torch.testing.assert_close(project()[2].flatten(2), attention.to_v(x), rtol=1e-4, atol=1e-5)
