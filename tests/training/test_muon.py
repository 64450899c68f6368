"""Muon in float32 against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sparse_forcing.training import muon
from sparse_forcing.training.muon import Float32Muon, make_muon, orthogonalize

SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
COEFFICIENTS = (3.4445, -4.775, 2.0315)


def steps(optimizer: torch.optim.Optimizer, p: nn.Parameter, gradients: Tensor) -> None:
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()


def relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_steps_are_those_of_torch_but_for_rounding(shape: tuple[int, int], nesterov: bool) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(4, *shape)
    moved = []
    for kind in (Float32Muon, torch.optim.Muon):
        p = nn.Parameter(start.clone())
        steps(kind([p], nesterov=nesterov, **SETTINGS), p, gradients)
        moved.append(p.detach() - start)
    assert moved[0].norm() > 0.05
    assert relative_difference(*moved) < 0.02  # one of them iterates in bfloat16


@pytest.mark.parametrize("kinds", [(torch.optim.Muon, Float32Muon), (Float32Muon, torch.optim.Muon)])
def test_a_run_goes_on_with_the_state_of_the_other(kinds: tuple[type[torch.optim.Optimizer], ...]) -> None:
    torch.manual_seed(0)
    p, gradients = nn.Parameter(torch.randn(16, 24)), torch.randn(4, 16, 24)
    first = kinds[0]([p], **SETTINGS)
    steps(first, p, gradients[:2])
    before, moved = p.detach().clone(), []
    for kind in kinds:
        copied = nn.Parameter(before.clone())
        optimizer = kind([copied], **SETTINGS)
        optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
        steps(optimizer, copied, gradients[2:])
        moved.append(copied.detach() - before)
    assert relative_difference(*moved) < 0.02


def test_an_orthogonalized_matrix_has_singular_values_near_one_and_the_same_directions() -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 40, dtype=torch.float64)
    y = orthogonalize(x, COEFFICIENTS, 5, 1e-7)
    assert torch.linalg.svdvals(y).aminmax() == pytest.approx((0.95, 0.95), abs=0.3)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inner = u.T @ y @ vh.T
    assert (inner - inner.diagonal().diag()).abs().max() < 1e-9
    torch.testing.assert_close(orthogonalize(x.T, COEFFICIENTS, 5, 1e-7), y.T)


def test_no_gradient_gives_no_update() -> None:
    p = nn.Parameter(torch.ones(3, 3))
    Float32Muon([p], lr=0.1, weight_decay=0.0).step()
    p.grad = torch.zeros(3, 3)
    Float32Muon([p], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(p, torch.ones(3, 3))


@pytest.mark.parametrize(("fast", "kind"), [(True, torch.optim.Muon), (False, Float32Muon)])
def test_torchs_own_is_taken_where_bfloat16_is_fast(
    monkeypatch: pytest.MonkeyPatch, fast: bool, kind: type[torch.optim.Optimizer]
) -> None:
    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda device: fast)
    assert type(make_muon([nn.Parameter(torch.ones(2, 2))], lr=1.0, weight_decay=0.0)) is kind
