"""Muon on stacks of matrices against torch's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_forcing.training.recipes.embedded import muon
from sparse_forcing.training.recipes.embedded.muon import BatchedMuon, orthogonalize

SETTINGS = {"lr": 0.02, "weight_decay": 0.1}
COEFFICIENTS = (3.4445, -4.775, 2.0315)
SHAPES = ((24, 24), (48, 16), (24, 24), (16, 48), (48, 16))


def torchs(parameters: list[nn.Parameter], **settings: float | bool) -> torch.optim.Muon:
    return torch.optim.Muon(parameters, adjust_lr_fn="match_rms_adamw", **settings)


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator) * (n + 1)) for n, shape in enumerate(SHAPES)]


def steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator) * 10.0**seed  # sizes do not matter to Muon
        optimizer.step()


def moved(after: list[nn.Parameter], before: list[nn.Parameter]) -> list[Tensor]:
    return [(a - b).detach() for a, b in zip(after, before, strict=True)]


def assert_nearly_equal(some: list[Tensor], others: list[Tensor], share: float) -> None:
    for a, b in zip(some, others, strict=True):
        assert a.norm() > 0.05
        assert (a - b).norm() < share * b.norm()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("bfloat16", [True, False])
def test_steps_are_those_of_torch_but_for_rounding(
    monkeypatch: pytest.MonkeyPatch, bfloat16: bool, nesterov: bool
) -> None:
    types = set()

    def watched(x: Tensor, *settings: Any) -> Tensor:
        types.add(x.dtype)
        return orthogonalize(x, *settings)

    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda device: bfloat16)
    monkeypatch.setattr(muon, "orthogonalize", watched)
    ours, theirs = matrices(), matrices()
    steps(BatchedMuon(ours, nesterov=nesterov, **SETTINGS), ours, range(4))
    steps(torchs(theirs, nesterov=nesterov, **SETTINGS), theirs, range(4))
    assert types == {torch.bfloat16 if bfloat16 else torch.float32}
    # torch always iterates in bfloat16
    assert_nearly_equal(moved(ours, matrices()), moved(theirs, matrices()), share=0.005 if bfloat16 else 0.02)


@pytest.mark.parametrize("kinds", [(torchs, BatchedMuon), (BatchedMuon, torchs)])
def test_a_run_goes_on_with_the_state_of_the_other(kinds: tuple) -> None:
    begun = matrices()
    first = kinds[0](begun, **SETTINGS)
    steps(first, begun, range(2))
    ends = []
    for kind in kinds:
        copied = copy.deepcopy(begun)
        optimizer = kind(copied, **SETTINGS)
        optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
        steps(optimizer, copied, range(2, 4))
        ends.append(moved(copied, begun))
    assert_nearly_equal(*ends, share=0.02)


def test_an_orthogonalized_matrix_has_singular_values_near_one_and_the_same_directions() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 12, 40, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    y = orthogonalize(x, COEFFICIENTS, 5, 1e-7)
    assert torch.linalg.svdvals(y).aminmax() == pytest.approx((0.95, 0.95), abs=0.3)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ y @ vh.mT
    assert (inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))).abs().max() < 1e-9
    torch.testing.assert_close(orthogonalize(x.mT, COEFFICIENTS, 5, 1e-7), y.mT)


def test_no_gradient_gives_no_update() -> None:
    p = nn.Parameter(torch.ones(3, 3))
    BatchedMuon([p], lr=0.1, weight_decay=0.0).step()
    p.grad = torch.zeros(3, 3)
    BatchedMuon([p], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(p, torch.ones(3, 3))
