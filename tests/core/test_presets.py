"""How published weights are sampled: presets, what a folder says of itself, plain Wan all at once, what is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import AutoTokenizer, UMT5EncoderModel

from sparse_forcing.config import build_config, read_settings
from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.flow import SamplerConfig, few_step_timesteps
from sparse_forcing.model_folder.defaults import PipelineConfig
from sparse_forcing.model_folder.folder import find_model, load_transformer, read_defaults, usual_dtype
from sparse_forcing.model_folder.presets import PRESETS
from sparse_forcing.model_folder.recognise import check_supported
from sparse_forcing.model_folder.remarks import folder_remarks
from sparse_forcing.model_folder.sizes import WAN, on_meta
from sparse_forcing.sampling.generation.jobs import PRESETS as NAMES
from sparse_forcing.sampling.generation.jobs import GenerateConfig
from sparse_forcing.sampling.generation.settings import choose_defaults, chunk_remarks, resolve_settings
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from tests.wan_folder import VIDEO, load, write_wan

LATENTS = (1, 3, 16, 4, 4)
STEPS, GUIDANCE, SHIFT = 4, 5.0, 3.0


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wan(tmp_path_factory.mktemp("wan"), SHIFT)


@pytest.fixture(scope="module")
def pipe(wan: Path) -> SparseForcingPipeline:
    return SparseForcingPipeline.from_pretrained(str(wan))


def edited(wan: Path, tmp_path: Path, name: str, **changes: Any) -> Path:
    """A copy of the folder with other settings in one of its JSON files."""
    folder = tmp_path / "model"
    shutil.copytree(wan, folder)
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_trainings_at_the_published_size_have_the_memory_of_its_preset() -> None:
    """Their models remember as `sparse-forcing` says, where they remember sparsely."""
    wanted, found = PRESETS["sparse-forcing"].memory, 0
    for path in sorted(Path("training/configs").glob("wan-*.yaml")):
        memory = read_settings(path).get("memory", {})
        if memory.get("kind") == "sparse":
            assert build_config(MemoryConfig, memory) == wanted, path
            found += 1
    assert found >= 5


def test_names_on_the_command_line_are_the_presets() -> None:
    assert list(NAMES) == list(PRESETS)
    assert all(config.preset == name for name, config in PRESETS.items())


def diffusers_pipeline(folder: Path, scheduler: Any) -> WanPipeline:
    theirs = WanPipeline(
        AutoTokenizer.from_pretrained(folder / "tokenizer"),
        UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        AutoencoderKLWan.from_pretrained(folder / "vae"),
        scheduler,
        WanTransformer3DModel.from_pretrained(folder / "transformer"),
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs


def test_plain_wan_is_sampled_as_diffusers_does(wan: Path, pipe: SparseForcingPipeline) -> None:
    theirs = diffusers_pipeline(wan, UniPCMultistepScheduler.from_pretrained(wan / "scheduler"))
    noise = torch.randn(LATENTS, generator=torch.Generator().manual_seed(3))
    asked: dict[str, Any] = {"prompt": "a red ball", "negative_prompt": "blue", "num_inference_steps": STEPS, **VIDEO}
    expected = theirs(latents=noise.transpose(1, 2), guidance_scale=GUIDANCE, output_type="latent", **asked).frames
    found = pipe(latents=noise, output_type="latent", **asked).frames
    assert pipe.defaults.sampler == SamplerConfig(kind="unipc", steps=50, shift=SHIFT, guidance_scale=GUIDANCE)
    torch.testing.assert_close(found.transpose(1, 2), expected, atol=9e-6, rtol=0)

    # Decoding adds nothing to that: equal latents are equal pixels, although they are decoded as a stream.
    wide = theirs.vae.config
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (wide.latents_mean, wide.latents_std))
    with torch.no_grad():
        pixels = theirs.vae.decode(expected / (1 / std) + mean).sample
    streamed = list(pipe.autoencoder.decode_stream(expected.split([1, 2], 2)))
    assert torch.equal(torch.cat(streamed, 2), pixels)
    shown = theirs(latents=noise.transpose(1, 2), guidance_scale=GUIDANCE, **asked).frames
    np.testing.assert_allclose(pipe(latents=noise, **asked).frames, shown, atol=9e-6)


def test_euler_steps_of_a_folder_are_those_of_diffusers(wan: Path, tmp_path: Path) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    theirs, folder = diffusers_pipeline(wan, scheduler), tmp_path / "model"
    shutil.copytree(wan, folder)
    scheduler.save_pretrained(folder / "scheduler")
    noise = torch.randn(LATENTS, generator=torch.Generator().manual_seed(3))
    asked: dict[str, Any] = {"prompt": "a red ball", "num_inference_steps": STEPS, "output_type": "latent", **VIDEO}
    expected = theirs(latents=noise.transpose(1, 2), negative_prompt="blue", guidance_scale=GUIDANCE, **asked).frames
    found = load(folder)(latents=noise, negative_prompt="blue", **asked).frames
    torch.testing.assert_close(found.transpose(1, 2), expected, atol=9e-6, rtol=0)


def test_a_whole_video_is_one_chunk_that_nothing_is_kept_of(pipe: SparseForcingPipeline) -> None:
    chunks = list(pipe.stream("a cat", num_inference_steps=1, **VIDEO))
    assert [len(chunk.frames) for chunk in chunks] == [VIDEO["num_frames"]]
    assert chunks[0].cache_bytes == 0
    longer = list(pipe.stream("a cat", num_inference_steps=1, **VIDEO | {"num_frames": 21}))
    assert [len(chunk.frames) for chunk in longer] == [21]


def test_whole_videos_continue_nothing(pipe: SparseForcingPipeline) -> None:
    with pytest.raises(ConfigError, match="make all frames at once"):
        pipe("a cat", image=torch.zeros(32, 32, 3).numpy(), **VIDEO)


def test_a_picture_is_one_latent_frame_of_wan(wan: Path, pipe: SparseForcingPipeline) -> None:
    chunked = pipe.with_defaults(choose_defaults(GenerateConfig(prompts=("a cat",), model=str(wan), chunk_frames=2)))
    picture = np.random.default_rng(0).random((32, 32, 3), np.float32)
    chunks = list(chunked.stream("a cat", num_inference_steps=1, image=picture, **VIDEO | {"num_frames": 17}))
    assert [len(chunk.frames) for chunk in chunks] == [9, 8]
    np.testing.assert_array_equal(chunks[0].frames[0], picture)


def test_chunks_of_plain_wan_are_warned_of_and_differ(wan: Path, pipe: SparseForcingPipeline) -> None:
    config = GenerateConfig(prompts=("a cat",), model=str(wan), chunk_frames=1)
    chosen = choose_defaults(config)
    assert "plain Wan" in chunk_remarks(chosen)[0]
    assert not chunk_remarks(choose_defaults(replace(config, chunk_frames=None)))
    chunked = pipe.with_defaults(chosen)
    latents = torch.randn(LATENTS, generator=torch.Generator().manual_seed(0))
    given = {"latents": latents, "output_type": "latent", "num_inference_steps": 2, **VIDEO}
    assert len(list(chunked.stream("a cat", num_inference_steps=1, **VIDEO))) == LATENTS[1]
    assert (chunked("a cat", **given).frames - pipe("a cat", **given).frames).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("scheduler/scheduler_config.json", {"flow_shift": 7.0}, {"kind": "unipc", "shift": 7.0}),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0},
            {"kind": "diffusers_euler", "shift": 2.0},
        ),
        ("transformer/config.json", {"_class_name": "CausalWanTransformer3DModel"}, {"kind": "few_step", "steps": 4}),
    ],
)
def test_what_a_folder_says_is_how_it_samples(
    wan: Path, tmp_path: Path, name: str, changes: dict, expected: dict
) -> None:
    sampler = read_defaults(edited(wan, tmp_path, name, **changes)).sampler
    assert {field: getattr(sampler, field) for field in expected} == expected


def test_causal_configs_of_others_name_chunk_window_and_sink(wan: Path, tmp_path: Path) -> None:
    folder = edited(
        wan,
        tmp_path,
        "transformer/config.json",
        _class_name="CausalWanTransformer3DModel",
        num_frames_per_block=1,
        local_attn_size=6,
        sink_size=2,
        causal_tricks=True,
    )
    defaults = read_defaults(folder)
    assert (defaults.preset, defaults.chunk_frames) == ("self-forcing-framewise", 1)
    assert (defaults.memory.kind, defaults.memory.window_frames, defaults.memory.sink_frames) == ("sink", 6, 2)
    remarks = folder_remarks(folder)
    assert any("not used: causal_tricks" in remark for remark in remarks)
    assert any("scheduler_config.json: not used" in remark for remark in remarks)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        load_transformer(folder)
    assert set(remarks) <= {str(warning.message) for warning in shown}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("transformer/config.json", {"in_channels": 36}, "image-to-video Wan"),
        ("transformer/config.json", {"image_dim": 1280, "added_kv_proj_dim": 5120}, "image-to-video Wan"),
        ("transformer/config.json", {"in_channels": 48, "out_channels": 48}, "Wan 2.2 TI2V-5B"),
        ("transformer/config.json", {"_class_name": "WanVACETransformer3DModel"}, "WanVACETransformer3DModel"),
        ("transformer/config.json", {"pos_embed_seq_len": 514}, "FLF2V"),
        ("vae/config.json", {"z_dim": 48, "patch_size": 2}, "Wan 2.2's autoencoder"),
        ("model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "Wan 2.2 A14B"),
        ("model_index.json", {"boundary_ratio": 0.875}, "Wan 2.2 A14B"),
        ("model_index.json", {"image_encoder": ["transformers", "CLIPVisionModel"]}, "image encoder"),
    ],
)
def test_other_wans_are_refused_by_name_before_anything_is_loaded(
    wan: Path, tmp_path: Path, name: str, changes: dict, message: str
) -> None:
    folder = edited(wan, tmp_path, name, **changes)
    for path in folder.rglob("*.safetensors"):
        path.unlink()  # reading one would be another error
    with pytest.raises(WeightsError, match=message) as error:
        SparseForcingPipeline.from_pretrained(str(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("scheduler/scheduler_config.json", "{"),
        ("model_index.json", "[]"),
        ("scheduler/scheduler_config.json", '{"_class_name": "UniPCMultistepScheduler", "flow_shift": "x"}'),
        ("scheduler/scheduler_config.json", '{"_class_name": "UniPCMultistepScheduler", "flow_shift": -1}'),
    ],
)
def test_damaged_configs_are_one_line(wan: Path, tmp_path: Path, name: str, text: str) -> None:
    folder = edited(wan, tmp_path, name)
    (folder / name).write_text(text)
    with pytest.raises(WeightsError, match=str(folder)):
        check_supported(folder)
        read_defaults(find_model(str(folder)))


def test_flags_change_a_preset(wan: Path) -> None:
    config = GenerateConfig(
        prompts=("a cat",),
        model=str(wan),
        preset="longlive",
        shift=4.0,
        fps=12.0,
        negative_prompt="dull",
        guidance_scale=2.0,
    )
    chosen = choose_defaults(config)
    assert chosen == replace(
        PRESETS["longlive"], fps=12.0, negative_prompt="dull", sampler=replace(PRESETS["longlive"].sampler, shift=4.0)
    )
    other = choose_defaults(replace(config, sampler="euler")).sampler
    assert (other.kind, other.steps, other.step_list, other.shift) == ("euler", 50, None, 4.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "causvid", "model": "tiny"}, "is for Wan's weights"),
        ({"memory": "window"}, "--memory has no effect"),
        ({"overlay": True}, "--overlay has no effect"),
        ({"negative_prompt": "dull", "guidance_scale": 1.0}, "--negative-prompt has no effect"),
    ],
)
def test_flags_without_effect_are_refused(wan: Path, pipe: SparseForcingPipeline, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config = GenerateConfig(**{"prompts": ("a cat",), "model": str(wan), **settings})
        choose_defaults(config)
        resolve_settings(config, pipe)


def test_causvid_denoises_at_the_timesteps_it_names() -> None:
    assert few_step_timesteps(PRESETS["causvid"].sampler).tolist() == [1000.0, 757.0, 522.0]
    assert few_step_timesteps(PRESETS["self-forcing"].sampler).tolist()[1] == pytest.approx(937.5)


def test_weights_are_computed_in_the_type_they_are_stored_in(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = {"cpu": True}
    monkeypatch.setattr(
        "sparse_forcing.model_folder.folder.multiplies_bfloat16", lambda device: fast.get(device.type, True)
    )
    assert usual_dtype(wan, "cpu") == torch.float32
    assert usual_dtype(wan, "cuda") == torch.bfloat16
    assert usual_dtype(find_model("tiny"), "cuda") == torch.float32
    folder = edited(wan, tmp_path, "model_index.json")
    load_transformer(wan).to(torch.bfloat16).save_pretrained(folder / "transformer")
    assert usual_dtype(folder, "cpu") == torch.bfloat16
    fast["cpu"] = False
    assert usual_dtype(folder, "cpu") == torch.float32
    pipe = SparseForcingPipeline.from_pretrained(str(folder))
    assert (pipe.dtype, pipe.text_encoder.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    frames = pipe("a cat", num_inference_steps=1, **VIDEO).frames
    assert frames.std() > 0
    assert SparseForcingPipeline.from_pretrained(str(folder), torch.float32).dtype == torch.float32
    assert SparseForcingPipeline.from_pretrained("tiny").dtype == torch.float32


def test_published_sizes_are_recognised_by_shape(wan: Path, tmp_path: Path) -> None:
    folder = tmp_path / "14b"
    (folder / "transformer").mkdir(parents=True)
    sizes = dict(on_meta(WAN["14b"]).config) | {"_class_name": "WanTransformer3DModel"}
    (folder / "transformer" / "config.json").write_text(json.dumps(sizes))
    defaults = read_defaults(folder)
    assert (defaults.preset, defaults.bidirectional) == ("wan-14b", True)
    assert sum(x.numel() for x in on_meta(WAN["14b"]).parameters()) == 14_288_491_584
    assert read_defaults(wan).preset == "wan-1.3b"


@pytest.mark.parametrize("changes", [{"chunk_frames": 0}, {"first_chunk_frames": -1}, {"context_timestep": 1001.0}])
def test_defaults_that_make_no_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        PipelineConfig(**changes)
