"""A clean pass ends with the keys and values of its last layer: what it leaves and every later frame are as if it had
gone on, and nothing of the rest is computed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_forcing.memory import MemoryConfig, RolloutMemory, dense, sparse
from sparse_forcing.memory.base import MemoryPass
from sparse_forcing.memory.sparse import SparseMemory
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.sampling.noise import SeededNoise
from sparse_forcing.sampling.rollout import TrainingRollout, rollout
from tests.memory.conftest import CHANNELS, CHUNK, COLS, ROWS, Rollout
from tests.memory.test_fixed_places import CONFIGS, SPARSE, tensors

CHUNKS, STEPS = 5, 2
MEMORIES = {
    **CONFIGS,
    "full": MemoryConfig(kind="full"),
    "accumulated": MemoryConfig(retention="accumulated", **SPARSE),
    "int8": MemoryConfig(cache_dtype="int8", **SPARSE),
}


def video(
    run: Rollout, config: MemoryConfig, training: TrainingRollout | None = None, **options: Any
) -> tuple[Tensor, RolloutMemory]:
    """[B, F, C, h, w] latents and the memory after its last clean pass."""
    memory = run.make(config, horizon=6, **options)
    noise = SeededNoise(
        [torch.Generator().manual_seed(seed) for seed in (1, 2)],
        (CHANNELS, 2 * ROWS, 2 * COLS),
        torch.device("cpu"),
        torch.float64,
    )
    sampler = SamplerConfig(steps=STEPS)
    parts = []
    for part in rollout(run.model, run.text, [CHUNK] * CHUNKS, memory, noise, sampler, training=training):
        parts.append(part.latents)
        part.remember()
    return torch.cat(parts, 1), memory


def state(memory: RolloutMemory) -> list[Tensor]:
    """What it remembers. Of blocks in 8 bits the pool that all layers share is scratch."""
    scratch: set[int] = set()
    everything = getattr(memory, "_all", None)
    if getattr(everything, "packed_keys", None) is not None:
        scratch = {everything.keys.data_ptr(), everything.values.data_ptr()}
    return [x for x in tensors(memory, set()) if x.data_ptr() not in scratch]


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Clean passes that go on to their end, until it is undone: the plain form."""
    monkeypatch.setattr(MemoryPass, "stops_early", False)
    return monkeypatch


@pytest.mark.parametrize("selects", [False, True])
@pytest.mark.parametrize("name", MEMORIES)
@torch.no_grad()
def test_what_is_left_and_all_later_frames_are_the_same(name: str, selects: bool, whole: pytest.MonkeyPatch) -> None:
    """Bitwise, with mean pooling and with learned selectors, which on a CPU choose in fewer calls."""
    config = MEMORIES[name]
    if selects and (config.kind != "sparse" or name == "ragged"):
        pytest.skip("no selectors")
    run = Rollout(selector_tokens=18) if selects else Rollout()
    options = {"selectors": run.model.selectors} if selects else {}
    expected, expected_memory = video(run, config, **options)
    whole.undo()
    found, memory = video(run, config, **options)
    assert torch.equal(found, expected)
    pairs = list(zip(state(memory), state(expected_memory), strict=True))
    assert len(pairs) >= 4
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("kind", ["window", "sparse", "heavy_hitter"])
@pytest.mark.parametrize("cache_gradient", ["detached", "straight_through"])
def test_training_gets_the_same_gradients(kind: str, cache_gradient: str, whole: pytest.MonkeyPatch) -> None:
    run, config = Rollout(), CONFIGS[kind]
    run.model.requires_grad_(True)
    found = []
    for plain in (True, False):
        if not plain:
            whole.undo()
        run.model.zero_grad()
        latents, _ = video(run, config, TrainingRollout(exit_steps=[STEPS - 1] * CHUNKS), cache_gradient=cache_gradient)
        latents.square().mean().backward()
        found.append([latents.detach(), *(weight.grad for weight in run.model.parameters())])
    assert all((mine is None and theirs is None) or torch.equal(mine, theirs) for mine, theirs in zip(*found))


@pytest.mark.parametrize("name", MEMORIES)
@torch.no_grad()
def test_nothing_after_the_last_keys_and_values_is_computed(name: str) -> None:
    run, config = Rollout(), MEMORIES[name]
    last, calls = run.model.blocks[-1], Counter[str]()

    def count(part: str, module: nn.Module) -> Any:
        return module.register_forward_hook(lambda *_: calls.update([part]))

    parts = {"keys": last.attn1.to_k, "first": run.model.blocks[0].ffn, "rest": last.ffn, "head": run.model.proj_out}
    hooks = [count(part, module) for part, module in parts.items()]
    hooks += [count("rest", module) for module in (last.attn1.to_out[0], last.attn2.to_q, last.attn2.to_out[0])]
    try:
        video(run, config)
    finally:
        for hook in hooks:
            hook.remove()
    passes = CHUNKS * (STEPS + 1)
    assert calls == {"keys": passes, "first": passes, "rest": 4 * CHUNKS * STEPS, "head": CHUNKS * STEPS}


@pytest.mark.parametrize("name", MEMORIES)
@torch.no_grad()
def test_the_last_attention_is_computed_only_where_a_rule_measures_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = Rollout(), MEMORIES[name]
    memory = run.make(config, horizon=6)
    measures = isinstance(memory, SparseMemory) and memory.rule.measures_mass(clean=True)
    calls: list[str] = []
    for module, call in ((dense, "dense_attention"), (sparse, "block_sparse_attention")):
        plain = getattr(module, call)
        monkeypatch.setattr(module, call, lambda *a, plain=plain, **k: calls.append("") or plain(*a, **k))
    x = torch.randn(2, CHANNELS, CHUNK, 2 * ROWS, 2 * COLS, dtype=torch.float64)
    layers = len(run.model.blocks)
    for _ in range(3):
        memory.begin_chunk(CHUNK)
        for policy, wanted in ((memory.denoising_pass(), layers), (memory.clean_pass(), layers - 1)):
            calls.clear()
            run.model(x, torch.full((2,), 500.0), run.text, policy=policy)
            assert len(calls) == wanted + (wanted < layers and measures)
