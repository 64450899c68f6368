"""Golden samplers: Euler and UniPC on an analytic velocity."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from sparse_forcing.model.flow import wan_levels
from sparse_forcing.sampling.samplers import sample_euler, sample_unipc
from tests.golden.golden_cases import Case, assert_close

KIND = "samplers"
SHIFT = 5.0


def recorded_runs(case: Case) -> list[tuple[str, str, int]]:
    """(name, kind, steps) of every trajectory."""
    found = (re.match(r"out\.((\w+?)(\d+))\.trajectory", name) for name in sorted(case.json["tensors"]))
    return [(m[1], m[2], int(m[3])) for m in found if m]


def test_trajectory(case: Case) -> None:
    recorded = case.tensors
    x, target, warp = (recorded[f"in.{name}"] for name in ("x", "target", "warpfield"))
    for name, kind, steps in recorded_runs(case):
        states: list[Tensor] = []
        times: list[float] = []

        def flow(x: Tensor, timestep: Tensor, step: int, states=states, times=times) -> Tensor:
            states.append(x)
            times.append(float(timestep))
            s = timestep / 1000
            return torch.tanh(x) * (0.5 + s) - target + 0.3 * torch.sin(3 * s) * warp

        if kind == "euler":
            end = sample_euler(flow, x, recorded[f"out.{name}.sigmas"])
        else:
            end = sample_unipc(flow, x, steps, SHIFT, wan_levels(steps) if kind == "sf_unipc" else None)
        after = torch.stack([*states[1:], end])
        kept = after if steps == 4 else after[[0, 1, 9, 19]]
        assert_close(torch.tensor(times), recorded[f"out.{name}.timesteps"], 1e-3, f"{name} timesteps")
        assert_close(kept, recorded[f"out.{name}.trajectory"], 1e-5, name)
