"""Golden A: the bidirectional transformer, forward and backward, against diffusers and Wan."""

from __future__ import annotations

import torch

from sparse_forcing.model.layers import timestep_sinusoid
from tests.golden.golden_cases import Case, assert_close, assert_gradient_norms

KIND = "wan_bidirectional"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


def test_output_and_input_gradients(case: Case, dtype: torch.dtype) -> None:
    recorded, inputs = case.tensors, case.inputs(dtype)
    model = case.model("A", dtype)
    x, text = inputs["x"].requires_grad_(), inputs["ctx"].requires_grad_()
    y = model(x, inputs["t"], text)
    (y * inputs["probe"]).sum().backward()
    for name, found in (("y", y), ("grad_x", x.grad), ("grad_ctx", text.grad)):
        assert_close(found, recorded[f"out64_wan.{name}"], TOLERANCE[dtype], name)
        assert_close(found, recorded[f"out_diffusers.{name}"], 1e-4, f"diffusers {name}")


def test_parameter_gradients(case: Case) -> None:
    inputs = case.inputs(torch.float64)
    model = case.model("A", torch.float64)
    (model(inputs["x"], inputs["t"], inputs["ctx"]) * inputs["probe"]).sum().backward()
    assert_gradient_norms(model, case.json["grad_norms_fp64"], 1e-9)


def test_one_timestep_per_frame(case: Case, dtype: torch.dtype) -> None:
    recorded, inputs = case.tensors, case.inputs(dtype)
    with torch.no_grad():
        y = case.model("A", dtype)(inputs["x"], inputs["t_frames"], inputs["ctx"])
    assert_close(y, recorded["out64_wan.y_frames"], TOLERANCE[dtype])


def test_timestep_embedding(case: Case) -> None:
    recorded = case.tensors
    sinusoid = timestep_sinusoid(recorded["in.t"], recorded["mid_diffusers.sinusoid"].shape[1])
    assert_close(sinusoid, recorded["mid_diffusers.sinusoid"], 1e-4)
