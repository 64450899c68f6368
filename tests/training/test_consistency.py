"""Consistency distillation: its target by hand, an exact solution, whose weights it takes, what trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from sparse_forcing.model.flow import FlowSchedule, SamplerConfig, euler_sigmas, few_step_timesteps
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.training.engine.optim import OptimizerConfig
from sparse_forcing.training.losses.flow_matching import consistency_target
from sparse_forcing.training.recipes.consistency import ConsistencyConfig, ConsistencyRecipe, student_levels
from sparse_forcing.training.recipes.shared import generators
from tests.training.conftest import CHUNK, HORIZON, SPARSE
from tests.training.test_recipes import DATA, LOOP, MEMORIES, weights

STUDENT = SamplerConfig(steps=2)


def make(folder: Path, **changes: Any) -> ConsistencyRecipe:
    settings: dict[str, Any] = {
        "loop": LOOP, "model": str(folder), "teacher": str(folder), "teacher_window": 4, "data": DATA,
        "memory": SPARSE, "sampler": STUDENT,
    }  # fmt: skip
    return ConsistencyRecipe(ConsistencyConfig(**{**settings, **changes}), Accelerator(cpu=True))


def test_the_target_is_the_teachers_step_and_the_averages_end() -> None:
    x = torch.tensor([4.0, -2.0, 8.0]).view(1, 3, 1, 1, 1)
    sigma, following = torch.tensor([[1.0, 0.75, 0.5]]), torch.tensor([[0.75, 0.5, 0.0]])
    asked: list[Tensor] = []

    def teacher(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append(sigma)
        return 2 * x

    def average(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append(sigma)
        return x + 1

    found = consistency_target(teacher, average, x, sigma, following)
    # 4 - 0.25 * 8 = 2, then 2 - 0.75 * 3; -2 + 0.25 * 4 = -1, then -1 - 0.5 * 0; 8 - 0.5 * 16 = 0, which is the end.
    assert found.flatten().tolist() == [-0.25, -1.0, 0.0]
    assert torch.equal(asked[0], sigma)
    assert torch.equal(asked[1], following)


@pytest.mark.parametrize("teacher_steps", [None, 6])
def test_an_exact_solution_has_no_loss(model_folder: Path, teacher_steps: int | None) -> None:
    """Noise e goes to e / 4 in a straight line, (1 - s) e / 4 + s e: Euler steps of its flow stay on it."""
    recipe = make(model_folder, teacher_steps=teacher_steps)

    def flow(x: Tensor, sigma: Tensor, end: float = 0.25) -> Tensor:
        s = sigma.double().view(*sigma.shape, 1, 1, 1)
        return x.double() * (1 - end) / ((1 - s) * end + s)

    recipe.teacher_flow = lambda x, sigma, clips: flow(x, sigma)  # type: ignore[method-assign]
    recipe.student = lambda x, sigma, clips: flow(x, sigma)  # type: ignore[method-assign]
    (exact,) = recipe.losses(0, 0)
    assert exact < 1e-12
    recipe.student = lambda x, sigma, clips: flow(x, sigma, end=0.3)  # type: ignore[method-assign]
    (other,) = recipe.losses(0, 0)
    assert other > 1e-6


def test_the_target_comes_from_averaged_weights_and_changes_none(model_folder: Path) -> None:
    recipe = make(model_folder)
    (before,) = recipe.losses(0, 0)
    trained, averages = weights(recipe.model), {name: x.clone() for name, x in recipe.ema.shadow.items()}
    (same,) = recipe.losses(0, 0)
    assert torch.equal(before, same)
    assert all(torch.equal(a, b) for a, b in zip(trained, recipe.model.parameters()))
    assert all(torch.equal(averages[name], x) for name, x in recipe.ema.shadow.items())
    for shadow in recipe.ema.shadow.values():
        shadow.mul_(1.5)
    (other,) = recipe.losses(0, 0)
    assert not torch.equal(before, other)


@pytest.mark.parametrize("memory", MEMORIES)
def test_through_a_memory_as_in_one_pass(model_folder: Path, memory: str) -> None:
    recipe = make(model_folder, memory=MEMORIES["full"])
    (parallel,) = recipe.losses(0, 0)
    everything = {"window": 4, "sink": 4, "sparse": 4}.get(memory)
    if everything is not None:
        recipe.memory = replace(MEMORIES[memory], window_frames=everything, density=1.0)
    (cached,) = recipe.losses(0, 0)
    torch.testing.assert_close(cached, parallel)


@pytest.mark.parametrize(
    "changes",
    [{"guidance_scale": 3.0}, {"teacher_window": None}, {"cache_gradient": "clean"}, {"memory": MEMORIES["full"]}],
    ids=["guided", "bidirectional", "clean", "full"],
)
def test_it_learns_and_leaves_its_teacher_alone(model_folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = make(model_folder, optimizer=OptimizerConfig(learning_rate=1e-3), **changes)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in recipe.model.parameters():  # a student that is not its teacher
            parameter.add_(0.2 * torch.randn_like(parameter))
    recipe.ema.reset(recipe.model)
    teacher = weights(recipe.teacher)
    found = [recipe.update(0)["consistency_loss"] for _ in range(12)]
    assert found[-1] < 0.5 * found[0]
    assert all(torch.equal(a, b) for a, b in zip(teacher, recipe.teacher.parameters()))
    assert all(p.grad is None for p in recipe.teacher.parameters())
    recipe.export(tmp_path / "pipeline")
    defaults = SparseForcingPipeline.from_pretrained(str(tmp_path / "pipeline")).defaults
    assert (defaults.sampler, defaults.memory) == (STUDENT, recipe.memory)


def test_guidance_moves_the_target(model_folder: Path) -> None:
    plain, guided = (next(make(model_folder, guidance_scale=scale).losses(0, 0)) for scale in (1.0, 9.0))
    assert not torch.allclose(plain, guided)


def test_a_bidirectional_teacher_has_one_level_for_a_clip(model_folder: Path) -> None:
    sources = generators(0, 0, 64, stream=2)
    chunks = [CHUNK, HORIZON - CHUNK]
    causal = make(model_folder).levels(sources, chunks)
    assert causal.unique().tolist() == [0, 1]
    assert torch.equal(causal[:, 0], causal[:, CHUNK - 1])
    assert not torch.equal(causal[:, 0], causal[:, -1])
    whole = make(model_folder, teacher_window=None).levels(sources, chunks)
    assert torch.equal(whole, whole[:, :1].expand_as(whole))


def test_levels_are_the_samplers_or_evenly_spaced() -> None:
    sampler = SamplerConfig(steps=4, step_list=(1000, 750, 500, 250))
    own = student_levels(ConsistencyConfig(loop=LOOP, teacher="tiny-base", sampler=sampler))
    listed = FlowSchedule(sampler.shift).sigma_at(few_step_timesteps(sampler))
    assert own.tolist() == [*listed.tolist(), 0.0]
    even = student_levels(ConsistencyConfig(loop=LOOP, teacher="tiny-base", sampler=sampler, teacher_steps=48))
    assert torch.equal(even, euler_sigmas(SamplerConfig(steps=48)))
    torch.testing.assert_close(even[:-1:12], listed, atol=1e-5, rtol=0)
