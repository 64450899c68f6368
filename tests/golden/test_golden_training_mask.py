"""Golden C: parallel training masks (diffusion and teacher forcing), and the same through a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_forcing.memory import MemoryConfig, MemoryGeometry, make_memory
from sparse_forcing.model.attention import ParallelAttention, block_causal_mask, teacher_forcing_mask
from tests.golden.golden_cases import Case, assert_close, assert_gradient_norms, chunk_sizes

KIND = "causal_training_mask"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


def chunks_of(case: Case) -> list[int]:
    first = 1 if case.json["independent_first_frame"] else None
    return chunk_sizes(case.json["frames"], case.json["num_frame_per_block"], first)


def window_of(case: Case) -> int | None:
    local = case.json["local_attn_size"]
    return None if local < 0 else local


def frame_mask(case: Case) -> Tensor:
    if case.json["teacher_forcing"]:
        return teacher_forcing_mask(chunks_of(case))
    return block_causal_mask(chunks_of(case), window=window_of(case))


def forward(case: Case, model, inputs: dict[str, Tensor]) -> Tensor:
    frames = case.json["frames"]
    if not case.json["teacher_forcing"]:
        policy = ParallelAttention(frames, frame_mask(case))
        return model(inputs["x"], inputs["t"], inputs["ctx"], policy=policy)
    policy = ParallelAttention(2 * frames, frame_mask(case), torch.arange(frames).repeat(2))
    return model(
        inputs["x"],
        inputs["t"],
        inputs["ctx"],
        policy=policy,
        clean_hidden_states=inputs["clean_x"],
        clean_timestep=inputs.get("aug_t"),
    )


def test_mask(case: Case) -> None:
    assert torch.equal(frame_mask(case), case.tensors["frame_mask"])


def test_output_and_input_gradients(case: Case, dtype: torch.dtype) -> None:
    recorded, inputs = case.tensors, case.inputs(dtype)
    leaves = {name: inputs[name].requires_grad_() for name in ("x", "clean_x") if name in inputs}
    y = forward(case, case.model("generator", dtype), inputs)
    (y * inputs["probe"]).sum().backward()
    assert_close(y, recorded["out64.y"], TOLERANCE[dtype], "y")
    for name, leaf in leaves.items():
        assert_close(leaf.grad, recorded[f"out.grad_{name}"], 1e-5, name)


def test_parameter_gradients(case: Case) -> None:
    inputs = case.inputs(torch.float64)
    model = case.model("generator", torch.float64)
    (forward(case, model, inputs) * inputs["probe"]).sum().backward()
    assert_gradient_norms(model, case.json["grad_norms_fp64"], 1e-9)


def test_equals_the_cached_form(case: Case, dtype: torch.dtype) -> None:
    """Chunk by chunk through a memory: teacher forcing leaves the clean chunk there, the other the noisy one."""
    recorded, inputs = case.tensors, case.inputs(dtype)
    model, window = case.model("generator", dtype), window_of(case)
    x, clean = inputs["x"], inputs.get("clean_x")
    clean_t = inputs.get("aug_t", torch.zeros_like(inputs["t"]))
    memory = make_memory(
        MemoryConfig(kind="full" if window is None else "window", window_frames=window or 1, positions="absolute"),
        MemoryGeometry(
            rows=x.shape[3] // 2,
            cols=x.shape[4] // 2,
            num_layers=len(model.blocks),
            chunk_frames=case.json["num_frame_per_block"],
            horizon_frames=case.json["frames"],
        ),
    )
    start, outputs = 0, []
    with torch.no_grad():
        for frames in chunks_of(case):
            part = slice(start, start + frames)
            memory.begin_chunk(frames)
            outputs.append(model(x[:, :, part], inputs["t"][:, part], inputs["ctx"], policy=memory.denoising_pass()))
            if clean is not None:
                model(clean[:, :, part], clean_t[:, part], inputs["ctx"], policy=memory.clean_pass())
            start += frames
    assert_close(torch.cat(outputs, 2), recorded["out64.y"], TOLERANCE[dtype])
