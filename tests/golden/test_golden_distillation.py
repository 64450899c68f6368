"""Golden F: DMD, critic and SiD losses on fixed latents, and a whole generator update through the rollout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_forcing.memory import MemoryConfig, MemoryGeometry, make_memory
from sparse_forcing.model.flow import FlowSchedule, SamplerConfig
from sparse_forcing.sampling.rollout import TrainingRollout, rollout
from sparse_forcing.training.losses.distribution_matching import (
    Compared,
    Score,
    critic_loss,
    distribution_gradient,
    dmd_loss,
    score_timestep,
    sid_loss,
)
from tests.golden.golden_cases import Case, RecordedNoise, assert_close, assert_gradient_norms, wan_key_table

KIND = "dmd_loss"
LOSS = {torch.float32: 1e-6, torch.float64: 1e-9}
GRADIENT = {torch.float32: 1e-7, torch.float64: 1e-12}
GENERATOR_SHIFT = 5.0


def score_of(model: nn.Module, text: Tensor, unconditional: Tensor) -> Score:
    def score(x_t: Tensor, timestep: Tensor, conditional: bool) -> Tensor:
        prompt = text if conditional else unconditional
        return model(x_t.transpose(1, 2), timestep, prompt).transpose(1, 2)

    return score


def scores(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    inputs = case.inputs(dtype)
    return {
        name: score_of(case.model(which, dtype).requires_grad_(False), inputs["ctx"], inputs["uncond"])
        for name, which in (("real", "A"), ("fake", "fake"))
    }


def variants(case: Case) -> dict[str, tuple[dict[str, Any], bool]]:
    """Recorded generator variants: name -> (settings, clamped draw or not)."""
    names = {name.split(".")[2] for name in case.json["tensors"] if name.startswith("out64.gen.")}
    settings = case.json.get("variants", {})
    return {name: (settings[name.removesuffix("_clamp")], name.endswith("_clamp")) for name in sorted(names)}


def compared(settings: dict[str, Any], latents: Tensor, noise: Tensor, timestep: Tensor) -> Compared:
    """Latents with the two schedules of a recorded variant."""
    names = ("generator_scheduler_shift", "score_scheduler_shift")
    return Compared(latents, noise, timestep, *(FlowSchedule(settings[name]) for name in names))


def test_dmd_loss(case: Case, dtype: torch.dtype) -> None:
    recorded, inputs = case.tensors, case.inputs(dtype)
    out = "out64" if dtype == torch.float64 else "out"
    for name, (settings, clamp) in variants(case).items():
        draw = inputs["clamp_raw_t" if clamp else "raw_t"][:, 0]
        timestep = score_timestep(draw, shift=GENERATOR_SHIFT)
        expected = {key: recorded[f"{out}.gen.{name}.{key}"] for key in ("timestep", "loss", "dloss_dlatents")}
        assert_close(timestep, expected["timestep"][:, 0].float(), 2e-4, f"{name} timestep")
        latents = inputs["latents"].requires_grad_()
        at = compared(settings, latents, inputs["noise"], expected["timestep"][:, 0].float())
        loss = dmd_loss(
            at,
            **scores(case, dtype),
            real_guidance=settings["real_guidance_scale"],
            fake_guidance=settings["fake_guidance_scale"],
            mask=inputs["gradient_mask"] if settings["gradient_mask"] else None,
        )
        (gradient,) = torch.autograd.grad(loss, latents)
        assert_close(loss.reshape(1), expected["loss"], LOSS[dtype], f"{name} loss")
        assert_close(gradient, expected["dloss_dlatents"], GRADIENT[dtype], f"{name} gradient")
        assert_close(
            gradient.norm().reshape(1), recorded[f"{out}.gen.{name}.dloss_dlatents_norm"], LOSS[dtype], f"{name} norm"
        )


def test_dmd_gradient_and_guided_predictions(case: Case) -> None:
    """The parts of the loss, where they were recorded: x_t, both predictions, the normalised gradient."""
    recorded, inputs, networks = case.tensors, case.inputs(torch.float32), scores(case, torch.float32)
    for name, (settings, clamp) in variants(case).items():
        if f"out.gen.{name}.grad" not in recorded or clamp:
            continue
        timestep = recorded[f"out.gen.{name}.timestep"][:, 0]
        at = compared(settings, inputs["latents"], inputs["noise"], timestep)
        x_t = at.x_t
        fake_x0, real_x0 = (at.predict_x0(networks[n], x_t) for n in ("fake", "real"))
        assert_close(x_t, recorded[f"out.gen.{name}.noisy"], 1e-6, "x_t")
        assert_close(fake_x0, recorded[f"out.gen.{name}.fake_score_cond_x0"], 1e-5, "fake")
        assert_close(real_x0, recorded[f"out.gen.{name}.real_score_cond_x0"], 1e-5, "real")
        real_x0 = at.predict_x0(networks["real"], x_t, settings["real_guidance_scale"])
        fake_x0 = at.predict_x0(networks["fake"], x_t, settings["fake_guidance_scale"])
        gradient = distribution_gradient(inputs["latents"], real_x0, fake_x0)
        assert_close(gradient, recorded[f"out.gen.{name}.grad"], 3e-5, "gradient")
        assert_close(gradient.abs().mean(), recorded[f"out.gen.{name}.gradnorm"], 1e-6, "gradient norm")


def score_shifts(case: Case, loss: str) -> list[float]:
    prefix = f"out64.{loss}.score_shift"
    names = {name.removeprefix(prefix).split(".")[0] for name in case.json["tensors"] if name.startswith(prefix)}
    return sorted(map(float, names))


def test_critic_loss(case: Case, dtype: torch.dtype) -> None:
    recorded, inputs = case.tensors, case.inputs(dtype)
    for shift in score_shifts(case, "critic"):
        name = f"critic.score_shift{shift:g}"
        timestep = score_timestep(inputs["critic_raw_t"][:, 0], shift=GENERATOR_SHIFT)
        model = case.model("fake", dtype)
        at = Compared(
            inputs["latents"], inputs["critic_noise"], timestep, FlowSchedule(GENERATOR_SHIFT), FlowSchedule(shift)
        )
        loss = critic_loss(at, score_of(model, inputs["ctx"], inputs["uncond"]))
        loss.backward()
        assert_close(timestep, recorded[f"out.{name}.timestep"][:, 0], 2e-4, "timestep")
        assert_close(loss.reshape(1), recorded[f"out64.{name}.loss"], LOSS[dtype], name)
        assert_gradient_norms(
            model, case.json["critic_grad_norms_fp64"][name], 1e-5 if dtype == torch.float32 else 1e-8
        )


def test_sid_loss(case: Case, dtype: torch.dtype) -> None:
    recorded, inputs = case.tensors, case.inputs(dtype)
    out = "out64" if dtype == torch.float64 else "out"
    for shift in score_shifts(case, "sid"):
        name = f"sid.score_shift{shift:g}"
        latents = inputs["latents"].requires_grad_()
        timestep = score_timestep(inputs["raw_t"][:, 0], shift=GENERATOR_SHIFT)
        at = Compared(latents, inputs["noise"], timestep, FlowSchedule(GENERATOR_SHIFT), FlowSchedule(shift))
        loss = sid_loss(at, **scores(case, dtype))
        (gradient,) = torch.autograd.grad(loss, latents)
        assert_close(loss.reshape(1), recorded[f"{out}.{name}.loss"], LOSS[dtype], f"{name} loss")
        assert_close(gradient, recorded[f"{out}.{name}.dloss_dlatents"], GRADIENT[dtype], f"{name} gradient")


def generator_update(
    case: Case, dtype: torch.dtype, cache_gradient: str, checkpointing: bool
) -> tuple[nn.Module, Tensor, Tensor]:
    """Self-rollout with gradients in the exit step of each chunk, DMD loss, backward -> model, latents, loss."""
    j, inputs = case.json, case.inputs(dtype)
    noise = inputs["noise"]
    chunks = [3] * (noise.shape[1] // 3)
    draws = [
        inputs[f"chunk{index}.{name}"]
        for index in range(len(chunks))
        for name in [f"renoise{i}" for i in range(j["exit_index"])] + ["context_noise"]
    ]
    model = case.model("generator", dtype)
    model.gradient_checkpointing = checkpointing
    memory = make_memory(
        MemoryConfig(kind="full", positions="absolute"),
        MemoryGeometry(
            rows=noise.shape[3] // 2,
            cols=noise.shape[4] // 2,
            num_layers=len(model.blocks),
            chunk_frames=3,
            horizon_frames=noise.shape[1],
        ),
        cache_gradient=cache_gradient,
    )
    training = TrainingRollout(exit_steps=[j["exit_index"]] * len(chunks), context_noise=True)
    parts = rollout(
        model, inputs["ctx"], chunks, memory, RecordedNoise(noise, draws), SamplerConfig(steps=4), training=training
    )
    latents = torch.cat([chunk.latents for chunk in parts], 1)
    timestep = score_timestep(inputs["dmd_raw_t"][:, 0], shift=GENERATOR_SHIFT)
    schedules = (FlowSchedule(GENERATOR_SHIFT), FlowSchedule(j["score_scheduler_shift"]))
    loss = dmd_loss(Compared(latents, inputs["dmd_noise"], timestep, *schedules), **scores(case, dtype))
    loss.backward()
    return model, latents, loss


@pytest.mark.kind("dmd_generator")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("cache_gradient", ["straight_through", "detached"])
def test_generator_update(case: Case, dtype: torch.dtype, cache_gradient: str, checkpointing: bool) -> None:
    double = dtype == torch.float64
    model, latents, loss = generator_update(case, dtype, cache_gradient, checkpointing)
    recorded = case.tensors
    assert_close(latents, recorded["out64.pred"], 1e-9 if double else 2e-5, "latents")
    assert_close(loss.reshape(1), recorded["out64.loss"], LOSS[dtype], "loss")
    kind = "out64" if cache_gradient == "straight_through" else "out64_detached_cache"
    parameters = dict(model.named_parameters())
    for name in [name for name in recorded if name.startswith(f"{kind}.grad.")]:
        found = parameters[wan_key_table()[name.removeprefix(f"{kind}.grad.")]].grad
        assert_close(found, recorded[name], 1e-11 if double else 2e-7, name)
    which = "reference" if cache_gradient == "straight_through" else "detached_cache"
    assert_gradient_norms(model, case.json[f"grad_norms_fp64_{which}"], 1e-8 if double else 1e-4)


@pytest.mark.kind("dmd_generator")
def test_only_exit_steps_carry_gradients(case: Case) -> None:
    per_chunk = case.json["exit_index"] + 2
    flags = [call["grad"] for call in case.json["generator_calls"]]
    assert flags == [step == case.json["exit_index"] for step in range(per_chunk)] * (len(flags) // per_chunk)
