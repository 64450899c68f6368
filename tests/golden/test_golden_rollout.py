"""Golden B and E: cached chunk-wise rollouts, every network call recorded, and the whole inference pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_forcing.memory import DenseMemory, MemoryConfig, MemoryGeometry, make_memory
from sparse_forcing.memory.base import MemoryPass
from sparse_forcing.model.attention import ParallelAttention, block_causal_mask
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.sampling.rollout import rollout
from tests.golden.golden_cases import Case, RecordedNoise, assert_close, chunk_sizes, step_list

KIND = "causal_rollout"
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9}


class RecordingModel:
    """Passes everything on and keeps (latents, timestep, flow) of every call, at pipeline level."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.encode_text = model, model.encode_text
        self.calls: list[tuple[Tensor, float, Tensor | None]] = []

    def __call__(self, x: Tensor, timestep: Tensor, text: Tensor, **kwargs: Any) -> Tensor | None:
        flow = self.model(x, timestep, text, **kwargs)
        level = timestep.flatten()[0].item()
        self.calls.append((x.transpose(1, 2), level, None if flow is None else flow.transpose(1, 2)))
        return flow


def memory_of(case: Case, model: torch.nn.Module, latents: Tensor) -> DenseMemory:
    local, sink = case.json["local_attn_size"], case.json["sink_size"]
    kind = "full" if local < 0 else "sink" if sink else "window"
    config = MemoryConfig(
        kind=kind, window_frames=max(local, 1), sink_frames=sink if kind == "sink" else 0, positions="absolute"
    )
    memory = make_memory(
        config,
        MemoryGeometry(
            rows=latents.shape[3] // 2,
            cols=latents.shape[4] // 2,
            num_layers=len(model.blocks),
            chunk_frames=case.json["num_frame_per_block"],
            horizon_frames=latents.shape[1],
        ),
    )
    assert isinstance(memory, DenseMemory)
    return memory


def chunks_of(case: Case) -> tuple[list[int], list[int] | None]:
    """Chunk sizes of the generated frames, and of the given ones (the video's first chunk may be one frame)."""
    j, shapes = case.json, case.json["tensors"]
    size, first = j["num_frame_per_block"], 1 if j.get("independent_first_frame") else None
    frames = shapes["in.noise"][1][1]
    if "in.initial_latent" not in shapes:
        return chunk_sizes(frames, size, first), None
    return chunk_sizes(frames, size), chunk_sizes(shapes["in.initial_latent"][1][1], size, first)


def sampler_of(case: Case) -> SamplerConfig:
    j = case.json
    steps = j["denoising_step_list"] if "denoising_step_list" in j else step_list(j["timesteps"], j["shift"])
    return SamplerConfig(steps=len(steps), step_list=tuple(steps), shift=j["shift"])


def run(case: Case, dtype: torch.dtype) -> tuple[Tensor, RecordingModel, DenseMemory]:
    """The case's rollout: latents [B, F, C, H, W] (given frames first), every call, and the memory it leaves."""
    inputs = case.inputs(dtype)
    model = RecordingModel(case.model("generator", dtype))
    renoise = [inputs[name] for name in sorted(inputs) if name.startswith("renoise")]
    renoise = list(renoise[0]) if case.name.startswith(KIND) else renoise
    given, (chunks, given_chunks) = inputs.get("initial_latent"), chunks_of(case)
    memory = memory_of(case, model.model, inputs["noise"])
    parts = [] if given is None else [given]
    with torch.no_grad():
        for chunk in rollout(
            model,
            inputs["ctx"],
            chunks,
            memory,
            RecordedNoise(inputs["noise"], renoise),
            sampler_of(case),
            initial_latents=None if given is None else given.split(given_chunks, 1),
            context_timestep=float(case.json.get("context_noise", 0)),
        ):
            parts.append(chunk.latents)
            chunk.remember()  # also the last one's clean pass was recorded
    return torch.cat(parts, 1), model, memory


def test_latents(case: Case, dtype: torch.dtype) -> None:
    assert_close(run(case, dtype)[0], case.tensors["out64.final"], TOLERANCE[dtype])


@pytest.mark.kind("rollout_pipeline")
def test_pipeline(case: Case, dtype: torch.dtype) -> None:
    assert_close(run(case, dtype)[0], case.tensors["out64.latents"], TOLERANCE[dtype])


def test_every_call(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryPass, "stops_early", False)  # what clean passes give was recorded, too
    _, model, _ = run(case, dtype)
    recorded = case.tensors
    assert len(model.calls) == len(case.json["calls"])
    for call, (x, timestep, flow) in zip(case.json["calls"], model.calls):
        name = f"call{call['index']:03d}"
        assert abs(timestep - call["timestep"]) < 2e-4, name
        if f"out.{name}.x" in recorded:
            assert_close(x, recorded[f"out.{name}.x"], 2e-5, f"{name}.x")
            assert_close(flow, recorded[f"out.{name}.flow"], 2e-5, f"{name}.flow")
        if f"out64.{name}.flow" in recorded:
            assert_close(flow, recorded[f"out64.{name}.flow"], TOLERANCE[dtype], f"{name}.flow in float64")


def test_cache_at_the_end(case: Case, dtype: torch.dtype) -> None:
    cached = {name: x for name, x in case.tensors.items() if name.startswith("out.kv.")}
    assert cached
    _, _, memory = run(case, dtype)
    for name, expected in cached.items():
        layer, which = name.split(".")[2:]
        assert_close(memory.cached(int(layer))[which == "v"], expected, 2e-5, name)


def test_equals_the_uncached_form(case: Case, dtype: torch.dtype) -> None:
    """Every denoising step of every chunk at once: [finished video | noisy chunks] under a frame mask, no cache."""
    recorded, inputs, j = case.tensors, case.inputs(dtype), case.json
    chunks, _ = chunks_of(case)
    frames, window = sum(chunks), None if j["local_attn_size"] < 0 else j["local_attn_size"]
    seen = block_causal_mask(chunks, window=window, sink=j["sink_size"])
    own = torch.block_diag(*[torch.ones(n, n) for n in chunks]).bool()
    mask = torch.cat([torch.cat([seen, torch.zeros_like(seen)], 1), torch.cat([seen & ~own, own], 1)])
    policy = ParallelAttention(2 * frames, mask, torch.arange(frames).repeat(2))
    clean = recorded["out64.final"].to(dtype).transpose(1, 2)
    model = case.model("generator", dtype)
    for step, timestep in enumerate(j["timesteps"]):
        calls = [f"out.call{call['index']:03d}" for call in j["calls"] if call["step"] == step]
        x, expected = (torch.cat([recorded[f"{name}.{key}"] for name in calls], 1) for key in ("x", "flow"))
        with torch.no_grad():
            flow = model(
                x.to(dtype).transpose(1, 2),
                torch.full((len(x),), timestep),
                inputs["ctx"],
                policy=policy,
                clean_hidden_states=clean,
            )
        assert_close(flow.transpose(1, 2), expected, 4e-5, f"step {step}")
