"""Muon in float32 against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_forcing.training import muon
from sparse_forcing.training.muon import Float32Muon, make_muon, orthogonalize

SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
COEFFICIENTS = (3.4445, -4.775, 2.0315)


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_steps_are_those_of_torch_but_for_rounding(shape):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(4, *shape)
    weights = {}
    for kind in (torch.optim.Muon, Float32Muon):
        p = nn.Parameter(start.clone())
        optimizer = kind([p], **SETTINGS)
        for gradient in gradients:
            p.grad = gradient.clone()
            optimizer.step()
        weights[kind] = p.detach()
        assert set(optimizer.state[p]) == {"momentum_buffer"}
    moved, other = (weights[kind] - start for kind in weights)
    assert (moved - other).norm() / moved.norm() < 0.02  # bfloat16 in one of them
    assert moved.norm() > 0.05


def test_an_orthogonalized_matrix_has_singular_values_near_one_and_the_same_directions():
    torch.manual_seed(0)
    x = torch.randn(12, 40, dtype=torch.float64)
    y = orthogonalize(x, COEFFICIENTS, 5, 1e-7)
    assert torch.linalg.svdvals(y).aminmax() == pytest.approx((0.95, 0.95), abs=0.3)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inner = u.T @ y @ vh.T
    assert (inner - inner.diagonal().diag()).abs().max() < 1e-9
    torch.testing.assert_close(orthogonalize(x.T, COEFFICIENTS, 5, 1e-7), y.T)


def test_no_gradient_gives_no_update():
    p = nn.Parameter(torch.ones(3, 3))
    Float32Muon([p], lr=0.1, weight_decay=0.0).step()
    p.grad = torch.zeros(3, 3)
    Float32Muon([p], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(p, torch.ones(3, 3))


@pytest.mark.parametrize(("fast", "kind"), [(True, torch.optim.Muon), (False, Float32Muon)])
def test_torchs_own_is_taken_where_bfloat16_is_fast(monkeypatch, fast, kind):
    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda device: fast)
    optimizer = make_muon([nn.Parameter(torch.ones(2, 2))], **SETTINGS)
    assert type(optimizer) is kind
