"""Golden D: the shifted grid and the conversions of Self-Forcing's scheduler."""

from __future__ import annotations

import re

import pytest
import torch

from sparse_forcing.model.flow import FlowSchedule, add_noise, flow_to_x0
from tests.golden.golden_cases import Case, assert_close

KIND = "flow_scheduler"


def shifts(case: Case) -> list[float]:
    return sorted(
        {float(m[1]) for name in case.json["tensors"] if (m := re.match(r"out\.shift([\d.]+)\.sigmas", name))}
    )


def test_grid(case: Case) -> None:
    recorded = case.tensors
    for shift in shifts(case):
        schedule, prefix = FlowSchedule(shift), f"out.shift{shift:g}"
        assert_close(schedule.sigmas, recorded[f"{prefix}.sigmas"], 2e-7, "sigmas")
        assert_close(schedule.timesteps, recorded[f"{prefix}.timesteps"], 2e-4, "timesteps")
        assert_close(schedule.training_weights, recorded[f"{prefix}.training_weights"], 1e-6, "weights")
        assert_close(schedule.sigma_at(recorded["in.t"]), recorded[f"{prefix}.sigma_at_t"], 2e-7, "sigma_at")
        assert_close(
            schedule.training_weight_at(recorded["in.t"]), recorded[f"{prefix}.training_weight_at_t"], 1e-6, "weight_at"
        )
        for name, warped in recorded.items():
            if name.startswith(f"{prefix}.warped_"):
                steps = [int(step) for step in name.rpartition("warped_")[2].split("_")]
                assert_close(schedule.warp(steps), warped, 2e-4, name)


def test_conversions(case: Case, dtype: torch.dtype) -> None:
    recorded, inputs = case.tensors, case.inputs(dtype)
    x, noise, flow, t = inputs["x"], inputs["noise"], inputs["flow"], inputs["t"]
    for shift in shifts(case):
        schedule = FlowSchedule(shift)
        sigma = schedule.sigma_at(t)
        prefix = f"{'out64' if dtype == torch.float64 else 'out'}.shift{shift:g}"
        assert_close(add_noise(x, noise, sigma), recorded[f"{prefix}.add_noise"], 1e-6, "add_noise")
        assert_close(flow_to_x0(flow, x, sigma), recorded[f"{prefix}.flow_to_x0"], 1e-6, "flow_to_x0")
        steps = torch.cat([schedule.sigmas, torch.zeros(1)]).diff()[schedule.find_index(t)].to(x.dtype)
        assert_close(
            x + flow * steps.view(-1, *[1] * (x.ndim - 1)), recorded[f"{prefix}.euler_step"], 1e-6, "euler_step"
        )
        assert_close(flow_to_x0(recorded[f"{prefix}.x0_to_flow"], x, sigma), noise, 1e-6, "x0_to_flow undone")


def test_a_different_shift_is_noticed(case: Case) -> None:
    recorded = case.tensors
    with pytest.raises(AssertionError):
        assert_close(FlowSchedule(4.9).sigmas, recorded[f"out.shift{shifts(case)[-1]:g}.sigmas"], 2e-7)
