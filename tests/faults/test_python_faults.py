"""The pipeline called by a program that is wrong: one error that names the argument, before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_forcing.errors import ConfigError, OutputError
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from tests.training.conftest import make_pipeline

CALL: dict[str, Any] = {"prompt": "a red ball", "num_frames": 16, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def pipe() -> SparseForcingPipeline:
    pipe = make_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def raises_an_error(*_: Any) -> dict[str, Any]:
    return {"latents": 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_frames": 10**12}, "num_frames: at most 1000000, got 1000000000000"),
        ({"num_frames": 2.5}, "num_frames: expected a whole number"),
        ({"height": 10**7}, "height: at most 16384"),
        ({"width": 10**7}, "width: at most 16384"),
        ({"guidance_scale": 1e308}, "guidance_scale: at most 100"),
        ({"guidance_scale": float("nan")}, "guidance_scale: a finite number"),
        ({"prompt": ["a", None]}, "prompt: expected str, got None"),
        ({"prompt": []}, "prompt: expected text"),
        ({"negative_prompt": 5, "guidance_scale": 2.0}, "negative_prompt"),
        ({"prompt": None, "prompt_embeds": torch.full((1, 4, 16), torch.nan)}, "prompt_embeds"),
        ({"generator": 0}, "generator: expected Generator"),
        ({"generator": [torch.Generator()] * 2}, "generator: 2 generators for 1 videos"),
        ({"latents": np.zeros((1, 2, 4, 4, 4))}, "latents: expected Tensor"),
        ({"image": np.full((32, 32, 3), np.nan)}, "image"),
        ({"video": np.zeros((0, 32, 32, 3), np.uint8)}, "video"),
        ({"memory": "sparse"}, "memory: expected MemoryConfig"),
        ({"callback_on_step_end": 5}, "callback_on_step_end: expected a function"),
        ({"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": 5}, "callback_on_step_end: expected"),
        ({"callback_on_step_end": raises_an_error}, "callback_on_step_end: latents: expected Tensor, got 1"),
        ({"prompt_changes": {"8": "a"}}, "prompt_changes: expected a whole number"),
        ({"prompt_changes": lambda frame: 5}, "prompt_changes: expected text"),
        ({"resumed": {"chunk": 1}}, "resumed: expected what `VideoChunk.state"),
        ({"resumed": 5}, "resumed: expected what `VideoChunk.state"),
    ],
)
def test_what_cannot_be_used_is_named(pipe: SparseForcingPipeline, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(pipe.stream(**CALL | given))


@pytest.mark.parametrize("prompts", [5, None, [], [5]])
def test_prompts_that_are_no_text_are_named(pipe: SparseForcingPipeline, prompts: Any) -> None:
    with pytest.raises(ConfigError, match="prompt: expected"):
        pipe.encode_prompt(prompts)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": 5}, "prompts: expected text"),
        ({"prompts": ["a", 5]}, "prompts: expected str"),
        ({"text_encoder": 5}, "text_encoder: expected Module"),
        ({"torch_dtype": {"encoder": "float16"}}, "torch_dtype: 'encoder' is none of transformer, text_encoder, vae"),
        ({"torch_dtype": {"vae": 5}}, "torch_dtype: expected one of"),
    ],
)
def test_what_a_model_cannot_be_loaded_with_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SparseForcingPipeline.from_pretrained("tiny", **given)


def test_a_folder_that_cannot_be_written_is_named(pipe: SparseForcingPipeline, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for where in ("/dev/null", "/proc/new", tmp_path / "file", tmp_path / "file" / "new"):
        with pytest.raises(OutputError, match=f"cannot write into {where}"):
            pipe.save_pretrained(where)


def test_streams_that_are_closed_or_beside_each_other_do_not_touch_others(pipe: SparseForcingPipeline) -> None:
    def stream(seed: int) -> Any:
        return pipe.stream(**CALL, generator=torch.Generator().manual_seed(seed))

    alone = [[chunk.frames for chunk in stream(seed)] for seed in (0, 1)]
    left = stream(2)
    next(left)
    left.close()
    pairs = [(first.frames, second.frames) for first, second in zip(stream(0), stream(1), strict=True)]
    np.testing.assert_array_equal([list(each) for each in zip(*pairs, strict=True)], alone)
    assert list(left) == []
