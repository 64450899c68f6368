"""Flow matching: conversions invert each other, grids have the shape the papers state."""

from __future__ import annotations

import pytest
import torch

from sparse_forcing.errors import ConfigError
from sparse_forcing.model.flow import FlowSchedule, add_noise, flow_to_x0, shift_sigma


def test_conversions_are_consistent_with_the_path() -> None:
    x0, noise = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64), torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    for sigma in (torch.tensor([0.1, 0.9], dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64) + 0.05):
        x_t, flow = add_noise(x0, noise, sigma), noise - x0
        torch.testing.assert_close(flow_to_x0(flow, x_t, sigma), x0)


def test_low_precision_latents_keep_their_type() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    sigma = torch.tensor([0.25, 0.5])
    assert add_noise(x, x, sigma).dtype == flow_to_x0(x, x, sigma).dtype == x.dtype


def test_published_few_step_lists() -> None:
    steps = [1000, 750, 500, 250]
    for shift, expected in (
        (5.0, [1000.0, 937.5, 833.3333, 625.0]),
        (8.0, [1000.0, 960.0, 888.889, 727.273]),
        (3.0, [1000.0, 900.0, 750.0, 500.0]),
    ):
        torch.testing.assert_close(FlowSchedule(shift).warp(steps), torch.tensor(expected), atol=1e-3, rtol=0)


def test_shift_keeps_the_ends_and_moves_the_middle_towards_noise() -> None:
    u = torch.linspace(0, 1, 11)
    shifted = shift_sigma(u, 5.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert (shifted[1:-1] > u[1:-1]).all()
    torch.testing.assert_close(shift_sigma(u, 1.0), u)


def test_euler_follows_a_straight_line_to_the_data() -> None:
    sigmas = torch.cat([FlowSchedule(5.0).sigmas, torch.zeros(1)]).double()
    x0, noise = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    x = noise
    for step in sigmas.diff():
        x = x + step * (noise - x0)
    torch.testing.assert_close(x, x0, atol=1e-5, rtol=0)


def test_nearest_entry_and_the_missing_zero() -> None:
    schedule = FlowSchedule(5.0)
    assert schedule.sigma_at(torch.tensor([0.0])).item() == pytest.approx(0.00498, abs=1e-5)
    assert schedule.sigma_at(torch.tensor([1000.0])).item() == 1
    assert schedule.training_weights.mean().item() == pytest.approx(1)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan")])
def test_impossible_shift_is_refused(shift: float) -> None:
    with pytest.raises(ConfigError, match="shift"):
        FlowSchedule(shift)
