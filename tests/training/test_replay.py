"""Gradients into written memory: the replay's are those of the rollout unrolled in one graph, and of differences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_forcing.memory import MemoryConfig, make_memory
from sparse_forcing.memory.base import MemoryGeometry
from sparse_forcing.model.attention import ParallelAttention
from sparse_forcing.model.flow import FlowSchedule, SamplerConfig, add_noise, few_step_timesteps, flow_to_x0
from sparse_forcing.sampling.noise import SeededNoise
from sparse_forcing.sampling.rollout import RolloutTrace, TrainingRollout, rollout
from sparse_forcing.training.recipes.replay import replay
from sparse_forcing.training.recipes.teacher_forcing import flow_through_memory
from tests.training.conftest import CHANNELS, CHUNK, SPARSE, make_pipeline
from tests.training.test_recipes import distill

SAMPLER, EXIT = SamplerConfig(steps=2), 1
CHUNKS = [CHUNK] * 6
MEMORIES = {
    "full": MemoryConfig(kind="full", positions="absolute"),
    "window": MemoryConfig(kind="window", window_frames=4),
    "sparse": SPARSE,
    "learned": SPARSE,
}


def make_model(name: str) -> Any:
    return make_pipeline(**({"selector_tokens": 8} if name == "learned" else {})).transformer.double()


def text() -> Tensor:
    return torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def fresh_noise() -> SeededNoise:
    sources = [torch.Generator().manual_seed(seed) for seed in (2, 3)]
    return SeededNoise(sources, (CHANNELS, 4, 4), torch.device("cpu"), torch.float64)


def levels() -> tuple[Tensor, Tensor]:
    timesteps = few_step_timesteps(SAMPLER).double()
    return timesteps, FlowSchedule(SAMPLER.shift).sigma_at(timesteps).double()


def plain_memory(model: Any, settings: MemoryConfig) -> Any:
    geometry = MemoryGeometry.of(model.config, 4, 4)
    return make_memory(settings, geometry, cache_gradient="clean", selectors=model.selectors, backend="reference")


def unroll(model: Any, settings: MemoryConfig) -> tuple[Tensor, list[Tensor]]:
    """Every chunk of a rollout, its exit step and its clean pass in one graph; finished latents are constants. Returns
    the chunks and what their exit steps began from."""
    memory, noise = plain_memory(model, settings), fresh_noise()
    timesteps, sigmas = levels()
    made, exits = [], []
    for frames in CHUNKS:
        memory.begin_chunk(frames)
        x = noise.chunk(frames)
        for step in range(EXIT + 1):
            if step == EXIT:
                exits.append(x)
            with torch.set_grad_enabled(step == EXIT):
                t = timesteps[step].expand(len(x))
                seen = memory if step == EXIT else memory.snapshot()  # a pass without gradients writes none
                flow = model(x.transpose(1, 2), t, text(), policy=seen.denoising_pass()).transpose(1, 2)
                x = flow_to_x0(flow, x, sigmas[step].expand(len(x)))
            if step < EXIT:
                x = add_noise(x, noise.fresh(frames), sigmas[step + 1].expand(len(x)))
        made.append(x)
        model(x.detach().transpose(1, 2), torch.zeros(len(x)), text(), policy=memory.clean_pass())
    return torch.cat(made, 1), exits


def traced(model: Any, settings: MemoryConfig) -> tuple[Tensor, RolloutTrace]:
    """The same by the rollout of this project, without gradients."""
    geometry, trace = MemoryGeometry.of(model.config, 4, 4), RolloutTrace()
    memory = make_memory(settings, geometry, cache_gradient="detached", selectors=model.selectors)
    training = TrainingRollout(exit_steps=[EXIT] * len(CHUNKS), gradient_from_frame=sum(CHUNKS), trace=trace)
    with torch.no_grad():
        chunks = rollout(model, text(), CHUNKS, memory, fresh_noise(), SAMPLER, training=training)
        return torch.cat([chunk.latents for chunk in chunks], 1), trace


def weight_of(latents: Tensor, *, last_only: bool = False) -> Tensor:
    """The derivative of a loss in the chunks."""
    weight = torch.randn(latents.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    if last_only:
        weight[:, : -CHUNKS[-1]] = 0
    return weight


def gradients(model: nn.Module, scalar: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad(scalar, parameters, allow_unused=True)
    return {name: x for name, x in zip(names, found) if x is not None}


def replayed(model: Any, settings: MemoryConfig, trace: RolloutTrace, weight: Tensor) -> Tensor:
    timesteps, sigmas = levels()
    return replay(model, settings, trace, text(), weight, timesteps[EXIT], sigmas[EXIT])[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MEMORIES)
def test_gradients_are_those_of_the_rollout_unrolled(name: str, checkpointing: bool) -> None:
    model, settings = make_model(name), MEMORIES[name]
    latents, exits = unroll(model, settings)
    expected = gradients(model, (latents * weight_of(latents)).sum())
    made, trace = traced(model, settings)
    torch.testing.assert_close(made, latents.detach(), rtol=0, atol=1e-10)
    for a, b in zip(trace.exits, exits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    model.gradient_checkpointing = checkpointing
    zero = replayed(model, settings, trace, weight_of(latents))
    assert zero == 0
    found = gradients(model, zero)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-8, atol=1e-8 * gradient.abs().max().item(), msg=key)


@pytest.mark.parametrize("name", ["full", "window"])
def test_dense_ones_are_those_of_a_mask(name: str) -> None:
    """No memory at all: one pass over all chunks, written and noisy, with a mask of what sees what."""
    model, settings = make_model(name), MEMORIES[name]
    latents, trace = traced(model, settings)
    timesteps, sigmas = levels()
    policy = ParallelAttention.teacher_forcing(CHUNKS, window=settings.window)
    noisy, clean = torch.cat(trace.exits, 1), torch.cat(trace.contexts, 1)
    t = timesteps[EXIT].expand(2, sum(CHUNKS))
    inputs = {"clean_hidden_states": clean.transpose(1, 2)}
    flow = model(noisy.transpose(1, 2), t, text(), policy=policy, **inputs).transpose(1, 2)
    weight = weight_of(latents)
    expected = gradients(model, (flow_to_x0(flow, noisy, sigmas[EXIT].expand(2)) * weight).sum())
    found = gradients(model, replayed(model, settings, trace, weight))
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-8, atol=1e-8 * gradient.abs().max().item(), msg=key)


@pytest.mark.parametrize("name", ["full", "window", "sparse"])
def test_what_chunks_wrote_learns_from_a_later_one(name: str) -> None:
    """Of the last chunk's loss alone: what differences of the weights say, with the latents kept, and not what is left
    when keys and values are constants."""
    model, settings = make_model(name), MEMORIES[name]
    latents, trace = traced(model, settings)
    weight = weight_of(latents, last_only=True)
    found = gradients(model, replayed(model, settings, trace, weight))
    generator, width = torch.Generator().manual_seed(5), 1e-6
    directions = {key: torch.randn(x.shape, generator=generator, dtype=x.dtype) for key, x in found.items()}
    expected = sum((found[key] * directions[key]).sum() for key in found)

    def value(cache_gradient: str = "detached") -> Tensor:
        timesteps, sigmas = levels()
        noisy, clean = torch.cat(trace.exits, 1), torch.cat(trace.contexts, 1)
        t = timesteps[EXIT].expand(2, sum(CHUNKS))
        flow, _ = flow_through_memory(model, settings, noisy, clean, t, text(), CHUNKS, cache_gradient=cache_gradient)
        return (flow_to_x0(flow, noisy, sigmas[EXIT].expand(2)) * weight).sum()

    sides = []
    with torch.no_grad():
        for sign in (1, -2):
            for key, parameter in model.named_parameters():
                if key in directions:
                    parameter.add_(sign * width * directions[key])
            sides.append(value())
        for key, parameter in model.named_parameters():
            if key in directions:
                parameter.add_(width * directions[key])
    difference = (sides[0] - sides[1]) / (2 * width)
    torch.testing.assert_close(difference, expected, rtol=1e-5, atol=0)
    detached = gradients(model, value())
    along = sum((detached[key] * directions[key]).sum() for key in detached)
    assert (along - expected).abs() > 1e-3 * expected.abs()


def test_a_step_of_long_tuning_learns_over_all_windows(model_folder: Path) -> None:
    def step(cache_gradient: str) -> tuple[list[float], dict[str, Tensor]]:
        recipe = distill(model_folder, windows=3, window_frames=2, cache_gradient=cache_gradient)
        losses = list(recipe.generator_losses(0, 0))
        sum(losses).backward()
        return [x.item() for x in losses], {name: p.grad for name, p in recipe.model.named_parameters()}

    apart, detached = step("detached")
    together, clean = step("clean")
    assert len(apart) == 3
    assert together == pytest.approx([sum(apart)], rel=1e-4)
    assert all(x is not None and x.isfinite().all() for x in clean.values())
    key = "blocks.0.attn1.to_v.weight"
    assert not torch.allclose(clean[key], detached[key], rtol=1e-2)
    torch.testing.assert_close(clean["proj_out.bias"], detached["proj_out.bias"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("changes", [{"loss": "sid"}, {"context_noise": True}], ids=["sid", "context-noise"])
def test_it_goes_with_what_a_rollout_may_have(model_folder: Path, changes: dict[str, Any]) -> None:
    recipe = distill(model_folder, cache_gradient="clean", **changes)
    before = [p.detach().clone() for p in recipe.model.parameters()]
    metrics = recipe.update(0)
    assert {"generator_loss", "critic_loss"} <= metrics.keys()
    assert any(not torch.equal(a, b) for a, b in zip(before, recipe.model.parameters()))


def test_the_selector_learns_on_the_way(selector_folder: Path) -> None:
    recipe = distill(selector_folder, cache_gradient="clean", selector_weight=0.5, memory=replace(SPARSE, density=0.5))
    plain = replace(recipe.config, selector_weight=0.0)
    (with_selector,) = recipe.generator_losses(0, 0)
    recipe.config = plain
    (without,) = recipe.generator_losses(0, 0)
    assert with_selector > without
