"""The learned selector: starts as the mean, learns from both of its paths, and can be made to choose well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_forcing.eval.bench.selector import measure_recall
from sparse_forcing.kernels.block_selection.interface import block_scores, pool_blocks
from sparse_forcing.memory import MemoryGeometry, make_memory
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model.selector import BlockSelector, recall, selection_loss
from sparse_forcing.sampling.noise import SeededNoise
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.sampling.rollout import TrainingRollout, rollout
from sparse_forcing.training.recipes.shared import add_selector
from sparse_forcing.weights.manifest import MANIFEST
from tests.training.conftest import CHANNELS, CHUNK, HORIZON, SPARSE, make_pipeline


def roll(model: Any, *, train: bool = False, layers: tuple[int, ...] = (), cache_gradient: str = "detached") -> Any:
    """(latents, memory) of a rollout of four chunks with recorded noise."""
    geometry = MemoryGeometry(rows=4, cols=4, num_layers=2, chunk_frames=CHUNK, horizon_frames=HORIZON)
    memory = make_memory(
        SPARSE,
        geometry,
        cache_gradient=cache_gradient if train else "none",
        selectors=model.selectors,
        backend="reference",
    )
    if layers:
        memory.distil_selectors(frozenset(layers))
    noise = SeededNoise([torch.Generator().manual_seed(1)], (CHANNELS, 4, 4), torch.device("cpu"), torch.float64)
    text = torch.ones(1, 3, 8, dtype=torch.float64)
    training = TrainingRollout(exit_steps=[1] * 4) if train else None
    with torch.set_grad_enabled(train):
        parts = rollout(model, text, [CHUNK] * 4, memory, noise, SamplerConfig(steps=2), training=training)
        return torch.cat([part.latents for part in parts], 1), memory


def test_untrained_selector_changes_nothing() -> None:
    plain, learned = make_pipeline().transformer.double(), make_pipeline(selector_tokens=8).transformer.double()
    learned.load_state_dict(plain.state_dict(), strict=False)
    assert len(learned.selectors) == 2
    torch.testing.assert_close(roll(learned)[0], roll(plain)[0])


def test_a_model_older_than_selectors_gets_one(tmp_path: Path) -> None:
    """A diffusers Wan folder does not mention the setting."""
    make_pipeline().save_pretrained(tmp_path / "old")
    (tmp_path / "old" / MANIFEST).unlink()
    path = tmp_path / "old/transformer/config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "selector_tokens"}))
    pipe = SparseForcingPipeline.from_pretrained(str(tmp_path / "old"))
    assert not pipe.transformer.selectors
    add_selector(pipe, SPARSE)
    assert len(pipe.transformer.selectors) == 2


def test_training_and_inference_rollouts_agree() -> None:
    model = perturbed()
    torch.testing.assert_close(roll(model, train=True)[0].detach(), roll(model)[0])


def perturbed() -> Any:
    model = make_pipeline(selector_tokens=8).transformer.double()
    with torch.no_grad():
        for selector in model.selectors:
            for parameter in selector.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def test_both_paths_reach_every_parameter() -> None:
    model = perturbed()
    latents, _ = roll(model, train=True)
    latents.square().sum().backward()
    coarse = {name for name, p in model.selectors[0].named_parameters() if p.grad is not None and p.grad.any()}
    assert coarse == {"query_weights", "key_weights", "query_projection", "key_projection", "gate"}
    model.zero_grad()
    _, memory = roll(model, train=True, layers=(0, 1))
    assert len(memory.selector_losses) == 8  # chunks x layers
    torch.stack(memory.selector_losses).mean().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {
        f"blocks.{i}.selector.{name}"
        for i in range(2)
        for name in ("query_weights", "key_weights", "query_projection", "key_projection")
    }


@pytest.mark.parametrize("cache_gradient", ["detached", "straight_through"])
def test_checkpointed_gradients_through_the_sparse_memory(cache_gradient: str) -> None:
    found: list[list[Tensor | None]] = []
    for checkpointing in (False, True):
        model = perturbed()
        model.gradient_checkpointing = checkpointing
        latents, _ = roll(model, train=True, cache_gradient=cache_gradient)
        latents.square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_loss_is_zero_for_the_true_distribution_and_falls_by_training() -> None:
    mass = torch.rand(1, 2, 3, 5)
    assert selection_loss(mass.log(), mass).item() == pytest.approx(0, abs=1e-6)
    scores = torch.zeros_like(mass, requires_grad=True)
    first = selection_loss(scores, mass)
    (gradient,) = torch.autograd.grad(first, scores)
    assert selection_loss(scores - gradient, mass) < first


def test_recall_counts_the_mass_inside_the_choice() -> None:
    mass = torch.tensor([[[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]]])
    scores = torch.tensor([[[[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]]]])
    assert recall(scores, mass, 1).item() == pytest.approx((0.5 + 0.8) / 2)
    assert recall(scores, mass, 2).item() == pytest.approx((0.7 + 0.9) / 2)
    assert recall(mass, mass, 3).item() == pytest.approx(1)


def blocks(seed: int) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, H, N, T, D] whose mean misleads: five of six keys repel every query by a different amount
    per block, so they draw no attention but drag the mean down."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(8, 2, 12, 1, 8, generator=generator).repeat(1, 1, 1, 6, 1) for _ in range(2))
    query[..., -1] = 3
    key[..., -1] = 0
    key[:, :, :, 1:] = 0
    key[:, :, :, 1:, -1] = -6 * torch.rand(8, 2, 12, 1, generator=generator)
    return query, key


def test_training_recovers_what_the_mean_hides() -> None:
    """A third of the gap between mean pooling and the oracle is the project's goal; here it can close most of it."""
    torch.manual_seed(0)
    selector = BlockSelector(2, 6, 8)

    def scores_and_mass(seed: int) -> tuple[Tensor, Tensor]:
        query, key = blocks(seed)
        attention = torch.einsum("bhnqd,bhmkd->bhnqmk", query, key) / 8**0.5
        mass = attention.flatten(-2).softmax(-1).unflatten(-1, (12, 6)).sum((-1, 3))
        pooled = (
            pool_blocks(x, None, getattr(selector, f"{side}_weights"), getattr(selector, f"{side}_projection"))
            for x, side in ((query, "query"), (key, "key"))
        )
        return block_scores(*pooled), mass

    optimizer = torch.optim.AdamW(selector.parameters(), lr=0.05, weight_decay=0)
    with torch.no_grad():
        mean = recall(*scores_and_mass(99), 3).mean()
        oracle = recall(scores_and_mass(99)[1], scores_and_mass(99)[1], 3).mean()
    for step in range(60):
        loss = selection_loss(*scores_and_mass(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        learned = recall(*scores_and_mass(99), 3).mean()
    assert (learned - mean) / (oracle - mean) > 1 / 3, (mean, learned, oracle)


def test_recall_of_a_rollout() -> None:
    """The oracle is best at every share, recall grows with the share, an untrained selector is the mean."""
    pipe = make_pipeline(selector_tokens=8)
    rows = measure_recall(pipe, ["a red circle", "a blue square"], chunks=4)
    assert [row["share"] for row in rows] == [0.0625, 0.125, 0.25]
    for row in rows:
        assert row["learned"]["mean"] == pytest.approx(row["mean"]["mean"])
        assert row["mean"]["mean"] <= row["oracle"]["mean"] <= 1
        assert len(row["mean"]["layers"]) == 2
    assert rows[0]["oracle"]["mean"] <= rows[2]["oracle"]["mean"]
