"""What diffusers asks of every pipeline (its tests' PipelineTesterMixin), where no other test asks it already."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline

from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from tests.core.small_pipelines import PROMPT, SHORT, load, make_wan, run


def test_a_call_shows_all_its_arguments() -> None:
    found = inspect.signature(SparseForcingPipeline.__call__).parameters
    wanted = {"prompt", "negative_prompt", "height", "width", "guidance_scale", "prompt_embeds", "num_frames"}
    optional = {"num_inference_steps", "num_videos_per_prompt", "generator", "latents", "output_type", "return_dict"}
    assert wanted | optional | {"callback_on_step_end", "image", "video", "memory"} <= set(found)
    assert all(found[name].default is not inspect.Parameter.empty for name in optional)
    assert not any(each.kind is each.VAR_KEYWORD for each in found.values())
    assert list(found)[:2] == ["self", "prompt"]


def test_what_was_saved_without_its_optional_parts_loads_without_them(
    pipe: SparseForcingPipeline, tmp_path: Path
) -> None:
    text = pipe.encode_prompt([PROMPT])
    expected = run(pipe, None, prompt_embeds=text, guidance_scale=1.0)
    bare = SparseForcingPipeline(pipe.transformer, None, pipe.vae, pipe.defaults)
    bare.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert (loaded.text_encoder, loaded.tokenizer, loaded.scheduler) == (None, None, None)
    # Weights are mapped where they lie in their file; products with numbers that lie askew may round otherwise.
    np.testing.assert_allclose(run(loaded, None, prompt_embeds=text, guidance_scale=1.0), expected, rtol=0, atol=1e-6)


def test_half_precision_is_saved_and_loaded(pipe: SparseForcingPipeline, tmp_path: Path) -> None:
    pipe.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path / "model")
    types = dict.fromkeys(("transformer", "text_encoder", "vae"), torch.bfloat16)
    loaded = load(tmp_path / "model", torch_dtype=types)
    assert {part.dtype for part in loaded.components.values() if isinstance(part, torch.nn.Module)} == {torch.bfloat16}
    np.testing.assert_array_equal(run(loaded), run(pipe))


def test_videos_for_every_prompt(pipe: SparseForcingPipeline) -> None:
    for prompts, repeats in ((PROMPT, 2), ([PROMPT], 1), ([PROMPT, "a blue ball"], 2)):
        frames = run(pipe, prompts, num_videos_per_prompt=repeats, num_frames=8)
        assert len(frames) == repeats * (1 if isinstance(prompts, str) else len(prompts))
    assert not np.array_equal(frames[0], frames[1])


def test_slicing_and_offloading_twice_change_nothing(pipe: SparseForcingPipeline, tmp_path: Path) -> None:
    expected = run(pipe)
    pipe.enable_attention_slicing()
    np.testing.assert_array_equal(run(pipe), expected)
    pipe.disable_attention_slicing()
    where = {"onload_device": torch.device("cpu"), "offload_to_disk_path": str(tmp_path), "num_blocks_per_group": 1}
    pipe.enable_group_offload(offload_type="block_level", **where)
    for _ in range(2):
        np.testing.assert_array_equal(run(pipe), expected)


def test_a_callback_changes_the_guidance(pipe: SparseForcingPipeline) -> None:
    def add(called: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        called._guidance_scale += 1.0
        return tensors

    plain = run(pipe, guidance_scale=2.0)
    changed = run(pipe, guidance_scale=2.0, callback_on_step_end=add)
    assert pipe.guidance_scale == 2.0 + SHORT["num_frames"] // 8 * pipe.num_timesteps
    assert np.abs(changed - plain).max() > 1e-4
    np.testing.assert_array_equal(run(pipe, guidance_scale=2.0), plain)  # the next video has its own


def test_guidance_that_a_callback_ends_is_ended_as_in_diffusers() -> None:
    ours = make_wan(chunk_frames=3)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    theirs = WanPipeline(**ours.components | {"scheduler": scheduler})
    noise, text, empty = torch.randn(1, 3, 16, 4, 4), torch.randn(1, 512, 16), torch.randn(1, 512, 16)
    ours.encode_prompt = lambda prompts: empty  # type: ignore[method-assign]
    sizes = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 4.0}

    def end(called: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        called._guidance_scale = 1.0
        return tensors

    found = []
    for callback in (end, None):
        given: dict[str, Any] = {
            "prompt_embeds": text,
            "callback_on_step_end": callback,
            "output_type": "latent",
            **sizes,
        }
        expected = theirs(latents=noise.transpose(1, 2), negative_prompt_embeds=empty, **given).frames
        found.append(ours(latents=noise, **given).frames)
        torch.testing.assert_close(found[-1].transpose(1, 2), expected, atol=9e-6, rtol=0)
    assert (found[0] - found[1]).abs().max() > 1e-3
