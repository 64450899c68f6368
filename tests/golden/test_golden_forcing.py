"""Golden aux_losses: diffusion forcing, teacher forcing and ODE regression, loss and every parameter gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparse_forcing.model.attention import ParallelAttention, block_causal_mask, teacher_forcing_mask
from sparse_forcing.model.flow import FlowSchedule, add_noise, flow_to_x0
from sparse_forcing.training.losses.flow_matching import (
    ode_inputs,
    ode_regression_loss,
    per_chunk,
    scheduled_flow_loss,
)
from tests.golden.golden_cases import Case, assert_close, assert_gradient_norms, chunk_sizes

KIND = "aux_losses"
BLOCK, STEPS = 3, [1000, 750, 500, 250]
NORMS = {torch.float32: 1e-4, torch.float64: 1e-5}  # the reference casts the error to float32 in both


def forcing_flow(
    model: nn.Module, x_t: Tensor, t: Tensor, text: Tensor, chunks: list[int], **context: Tensor
) -> Tensor:
    """The flow of noisy latents [B, F, C, H, W]: block-causal, or after the clean ones of `context`."""
    frames = sum(chunks)
    policy = ParallelAttention(frames, block_causal_mask(chunks))
    if context:
        policy = ParallelAttention(2 * frames, teacher_forcing_mask(chunks), torch.arange(frames).repeat(2))
    return model(x_t.transpose(1, 2), t, text, policy=policy, **context).transpose(1, 2)


@pytest.mark.parametrize("variant", ["df", "tf", "tf_aug"])
def test_forcing_loss(case: Case, dtype: torch.dtype, variant: str) -> None:
    if f"out.{variant}.loss" not in case.json["tensors"]:
        pytest.skip(f"{variant} was not recorded")
    recorded, inputs, schedule = case.tensors, case.inputs(dtype), FlowSchedule(5.0)
    clean, noise = inputs["clean"], inputs["noise"]
    chunks = chunk_sizes(clean.shape[1], BLOCK)
    t = schedule.timesteps[per_chunk(inputs["index"], chunks)]
    x_t = add_noise(clean, noise, schedule.sigma_at(t))
    context = {}
    if variant != "df":
        context["clean_hidden_states"] = clean.transpose(1, 2)
    if variant == "tf_aug":
        aug_t = schedule.timesteps[per_chunk(inputs["aug_index"], chunks)]
        context["clean_hidden_states"] = add_noise(clean, noise, schedule.sigma_at(aug_t)).transpose(1, 2)
        context["clean_timestep"] = aug_t
    model = case.model("generator", dtype)
    flow = forcing_flow(model, x_t, t, inputs["ctx"], chunks, **context)
    loss = scheduled_flow_loss(flow, noise - clean, t, schedule)
    loss.backward()
    assert_close(flow_to_x0(flow, x_t, schedule.sigma_at(t)), recorded[f"out.{variant}.x0_pred"], 2e-5, "x0")
    assert_close(loss.reshape(1), recorded[f"out64.{variant}.loss"], 1e-6, "loss")
    assert_gradient_norms(model, case.json["grad_norms_fp64"][variant], NORMS[dtype])


def test_ode_regression(case: Case, dtype: torch.dtype) -> None:
    recorded, inputs, schedule = case.tensors, case.inputs(dtype), FlowSchedule(5.0)
    trajectory = inputs["ode_latent"]
    chunks = chunk_sizes(trajectory.shape[2], BLOCK)
    index = per_chunk(inputs["ode_index"], chunks)
    t = torch.cat([schedule.warp(STEPS), torch.zeros(1)])[index]
    x_t = ode_inputs(trajectory, index)
    model = case.model("generator", dtype)
    flow = forcing_flow(model, x_t, t, inputs["ctx"], chunks)
    loss = ode_regression_loss(flow, x_t, trajectory[:, -1], t, schedule)
    loss.backward()
    assert_close(x_t, recorded["out.ode.input"], 0, "input")
    assert_close(flow_to_x0(flow, x_t, schedule.sigma_at(t)), recorded["out.ode.output"], 2e-5, "x0")
    double = dtype == torch.float64
    assert_close(loss.reshape(1), recorded["out64.ode.loss"], 1e-9 if double else 1e-6, "loss")
    assert_gradient_norms(model, case.json["grad_norms_fp64"]["ode"], 1e-8 if double else 1e-4)
