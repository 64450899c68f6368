"""The pipeline as one of diffusers': what diffusers does with any pipeline's parts works, and changes no frame."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from diffusers.callbacks import PipelineCallback
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model.vae import PatchAutoencoder, TokenAutoencoder
from sparse_forcing.model_folder.folder import PipelineConfig
from sparse_forcing.sampling.generation.jobs import GenerateConfig
from sparse_forcing.sampling.generation.placement import check_placement, place
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from tests.core.small_pipelines import PROMPT, SHORT, load, make_pipe, make_wan, run

WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def expected(shared: SparseForcingPipeline) -> np.ndarray:
    return run(copy.deepcopy(shared))


@pytest.fixture(scope="module")
def folder(shared: SparseForcingPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    shared.save_pretrained(path)
    return path


# Loading and saving


def test_every_part_is_a_component_that_can_be_saved_and_loaded(folder: Path, expected: np.ndarray) -> None:
    pipe = load(folder)
    assert set(pipe.components) == {"transformer", "text_encoder", "tokenizer", "vae", "scheduler"}
    assert pipe.components["tokenizer"] is not None
    np.testing.assert_array_equal(run(pipe), expected)
    np.testing.assert_array_equal(
        pipe(PROMPT, generator=torch.Generator().manual_seed(0), return_dict=False)[0], expected
    )


def test_a_variant_lies_beside_the_plain_weights(pipe: SparseForcingPipeline, folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    with torch.no_grad():
        pipe.transformer.proj_out.bias += 1
    pipe.save_pretrained(model, variant="other")
    assert (model / "transformer" / f"{WEIGHTS}.other.safetensors").is_file()
    plain, other = load(model), load(model, variant="other")
    torch.testing.assert_close(other.transformer.proj_out.bias, plain.transformer.proj_out.bias + 1)
    with pytest.raises(WeightsError, match="variant=third"):
        load(model, variant="third")


def test_each_part_has_the_type_asked_for(folder: Path) -> None:
    pipe = load(folder, torch_dtype={"text_encoder": "bfloat16", "vae": torch.float16, "default": torch.float32})
    assert (pipe.transformer.dtype, pipe.text_encoder.dtype, pipe.vae.dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    )
    assert load(folder, torch_dtype=torch.bfloat16).vae.dtype == torch.float32
    with pytest.raises(ConfigError, match="torch_dtype"):
        load(folder, torch_dtype={"vae": "int8"})


def test_large_weights_are_saved_in_pieces(pipe: SparseForcingPipeline, tmp_path: Path, expected: np.ndarray) -> None:
    pipe.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model" / "transformer").glob("*.safetensors"))) > 1
    np.testing.assert_array_equal(run(load(tmp_path / "model")), expected)


def test_parts_can_be_passed_in_place_of_the_folders_own(folder: Path, expected: np.ndarray) -> None:
    transformer = load(folder).transformer
    pipe = load(folder, transformer=transformer)
    assert pipe.transformer is transformer
    np.testing.assert_array_equal(run(pipe), expected)


@pytest.mark.parametrize(
    "options", [{"trust_remote_code": True}, {"custom_pipeline": "x"}, {"use_safetensors": False}, {"use_onnx": True}]
)
def test_code_and_pickles_are_refused(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        load(folder, **options)


def test_code_and_pickles_in_a_folder_are_not_read(pipe: SparseForcingPipeline, folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    (model / "manifest.json").unlink()
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"vae": ["os", "system"], "transformer": ["x", "Y"]}))
    assert isinstance(load(model).vae, TokenAutoencoder)  # classes come from the kinds, not from the file
    (model / "model_index.json").write_text(json.dumps(index | {"scheduler": ["os", "system"]}))
    with pytest.raises(WeightsError, match="none of diffusers' schedulers"):
        load(model)
    (model / "model_index.json").write_text(json.dumps(index))
    code = model / "transformer" / "sparse_forcing.model.transformer.py"
    code.write_text("raise SystemExit('it was run')")
    with pytest.raises(WeightsError, match="contains custom code"):
        load(model)
    code.unlink()
    weights = model / "transformer" / f"{WEIGHTS}.safetensors"
    torch.save(pipe.transformer.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(WeightsError, match="pickled weights are not read"):
        load(model)
    with pytest.raises(ConfigError, match="safe_serialization"):
        pipe.save_pretrained(tmp_path / "pickled", safe_serialization=False)


def test_a_hub_model_is_read_from_the_local_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: np.ndarray
) -> None:
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "cache" / "models--someone--small"
    shutil.copytree(folder, repository / "snapshots" / "0123456789")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123456789")
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    np.testing.assert_array_equal(run(SparseForcingPipeline.from_pretrained("someone/small", **options)), expected)
    with pytest.raises(WeightsError, match=r"someone/other: neither a folder.* nor found on the hub") as error:
        SparseForcingPipeline.from_pretrained("someone/other", **options)
    assert "\n" not in str(error.value)


# Devices, types, memory


def test_types_move_together_and_frames_are_still_frames(pipe: SparseForcingPipeline, expected: np.ndarray) -> None:
    pipe.to(torch.bfloat16)
    assert {part.dtype for part in pipe.components.values() if isinstance(part, torch.nn.Module)} == {torch.bfloat16}
    video = np.full((8, 32, 32, 3), 0.5, np.float32)
    frames = run(pipe)
    assert frames.shape == expected.shape
    assert np.isfinite(run(pipe, video=video)).all()
    pipe.to(dtype=torch.float32)
    assert pipe.dtype == torch.float32
    assert pipe.to("meta").device.type == "meta"


def test_two_in_a_batch_are_as_each_alone(pipe: SparseForcingPipeline) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 7)]
    both = pipe([PROMPT, "a blue ball"], generator=generators, **SHORT).frames
    for frames, prompt, seed in zip(both, (PROMPT, "a blue ball"), (3, 7)):
        alone = pipe(prompt, generator=[torch.Generator().manual_seed(seed)], **SHORT).frames[0]
        np.testing.assert_allclose(frames, alone, atol=2e-5)


def test_models_offloaded_as_a_whole_compute_the_same(pipe: SparseForcingPipeline, expected: np.ndarray) -> None:
    with pytest.raises(RuntimeError, match="requires accelerator"):
        copy.deepcopy(pipe).enable_model_cpu_offload()
    called = []
    pipe.enable_model_cpu_offload(device="cpu")
    for name in ("transformer", "text_encoder", "vae"):
        hook = getattr(pipe, name)._hf_hook
        before = hook.pre_forward
        hook.pre_forward = lambda *a, _name=name, _before=before, **k: (called.append(_name), _before(*a, **k))[1]
    np.testing.assert_array_equal(run(pipe), expected)
    assert set(called) == {"transformer", "text_encoder", "vae"}
    np.testing.assert_array_equal(run(pipe), expected)  # hooks are put back


def test_selectors_stay_when_modules_are_offloaded_one_by_one(
    pipe: SparseForcingPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memories read their weights and never call them. It needs an accelerator: accelerate cannot do it with the CPU as
    the device that computes, so that the hooks alone are seen here."""
    pipe.enable_sequential_cpu_offload(device="meta")
    hooked = {name for name, module in pipe.transformer.named_modules() if hasattr(module, "_hf_hook")}
    assert {"blocks.0.attn1.to_q", "blocks.1.ffn.net.2", "proj_out"} <= hooked
    assert not any("selector" in name for name in hooked)
    assert pipe.transformer.selectors[1].gate.device.type == "meta"


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_groups_of_layers_are_on_the_device_when_they_compute(kind: str, tmp_path: Path) -> None:
    """Layers that are offloaded to disk are empty outside their own call, so whatever reads around a hook fails."""
    where = {"onload_device": torch.device("cpu"), "offload_to_disk_path": str(tmp_path), "num_blocks_per_group": 1}
    pipe = make_pipe()
    expected = run(pipe)
    pipe.enable_group_offload(offload_type=kind, **where)
    np.testing.assert_array_equal(run(pipe), expected)


def test_weights_may_be_stored_coarser_than_they_compute(pipe: SparseForcingPipeline, expected: np.ndarray) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert pipe.dtype == torch.float32
    frames = run(pipe)
    assert frames.shape == expected.shape
    assert 0 < np.abs(frames - expected).max() < 0.5


def test_a_device_map_places_the_parts(folder: Path, expected: np.ndarray) -> None:
    pipe = load(folder, device_map="cpu")
    assert pipe.hf_device_map == "cpu"
    np.testing.assert_array_equal(run(pipe), expected)
    with pytest.raises(WeightsError, match="auto not supported"):
        load(folder, device_map="auto")


# Calls


def test_callbacks_are_called_as_diffusers_calls_them(pipe: SparseForcingPipeline, expected: np.ndarray) -> None:
    seen = []

    def note(called: Any, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        assert called is pipe
        assert set(tensors) == {"latents", "prompt_embeds", "negative_prompt_embeds"}
        assert tensors["latents"].shape == (1, 2, 16, 4, 4)
        assert tensors["prompt_embeds"].shape == tensors["negative_prompt_embeds"].shape == (1, 6, 16)
        seen.append((pipe.current_chunk, step, round(float(timestep))))
        return tensors

    frames = run(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=pipe._callback_tensor_inputs)
    np.testing.assert_array_equal(frames, expected)
    assert [step[:2] for step in seen] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert seen[0][2] == 1000 > seen[1][2] > 0
    assert pipe.num_timesteps == 2
    with pytest.raises(ConfigError, match="image_embeds"):
        run(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["image_embeds"])


@pytest.mark.parametrize("kind", ["euler", "few_step", "unipc", "wan_unipc"])
def test_what_a_callback_returns_is_gone_on_from(pipe: SparseForcingPipeline, kind: Any) -> None:
    pipe.defaults = PipelineConfig(
        height=32,
        width=32,
        text_encoder="words",
        vae="token",
        sampler=SamplerConfig(kind=kind, steps=3, guidance_scale=2.0),
        memory=pipe.default_memory,
    )

    def zero(called: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last = step == called.num_timesteps - 1
        return {"latents": torch.zeros_like(tensors["latents"])} if last else {}

    assert not run(pipe, output_type="latent", callback_on_step_end=zero).any()
    plain = run(pipe, output_type="latent")
    for name in ("latents", "prompt_embeds", "negative_prompt_embeds"):

        def double(
            called: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor], name: str = name
        ) -> dict[str, torch.Tensor]:
            return {name: tensors[name] * 2} if step == 0 else {}

        changed = run(
            pipe, output_type="latent", callback_on_step_end=double, callback_on_step_end_tensor_inputs=[name]
        )
        assert changed.isfinite().all()
        assert (changed - plain).abs().max() > 1e-4
    with pytest.raises(ConfigError, match=r"returned latents of shape \[1\]"):
        run(pipe, callback_on_step_end=lambda *_: {"latents": torch.zeros(1)})


def test_a_callback_can_end_the_video(pipe: SparseForcingPipeline, expected: np.ndarray) -> None:
    steps = []

    class Stop(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012

        def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: Any) -> Any:
            steps.append(step_index)
            pipeline._interrupt = len(steps) == 3
            return callback_kwargs

    frames = run(pipe, num_frames=32, callback_on_step_end=Stop(cutoff_step_ratio=1.0, cutoff_step_index=None))
    assert steps == [0, 1, 0]
    assert pipe.interrupt
    assert frames.shape[1] == 16  # the second chunk is the last one, after one of its two steps
    np.testing.assert_array_equal(frames[:, :8], expected[:, :8])
    assert np.abs(frames[:, 8:] - expected[:, 8:]).max() > 1e-4
    np.testing.assert_array_equal(run(pipe), expected)  # the next video is not ended


def test_progress_is_shown_by_steps_and_can_be_silenced(
    pipe: SparseForcingPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(PROMPT, **SHORT)
    assert "4/4" in capsys.readouterr().err  # two chunks of two steps
    pipe.set_progress_bar_config(disable=True)
    pipe(PROMPT, **SHORT)
    assert not capsys.readouterr().err


def test_a_diffusers_scheduler_can_take_the_samplers_place(pipe: SparseForcingPipeline, tmp_path: Path) -> None:
    pipe.defaults = PipelineConfig(
        height=32,
        width=32,
        text_encoder="words",
        vae="token",
        memory=pipe.default_memory,
        sampler=SamplerConfig(kind="unipc", steps=3, shift=3.0, guidance_scale=2.0),
    )
    own = run(pipe)
    pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    np.testing.assert_array_equal(run(pipe), own)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler = run(pipe)
    assert np.abs(euler - own).max() > 1e-4
    pipe.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert isinstance(loaded.scheduler, FlowMatchEulerDiscreteScheduler)
    np.testing.assert_array_equal(run(loaded), euler)


def test_two_pipelines_share_their_parts(pipe: SparseForcingPipeline, expected: np.ndarray) -> None:
    other = SparseForcingPipeline(**pipe.components, defaults=pipe.defaults)
    assert all(other.components[name] is part for name, part in pipe.components.items())
    np.testing.assert_array_equal(run(other), expected)
    plain = SparseForcingPipeline(**pipe.components).defaults
    assert (plain.text_encoder, plain.vae, plain.sampler) == ("words", "token", SamplerConfig())


# Adapters


def make_adapters(transformer: CausalWanTransformer3DModel) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(transformer)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "ffn.net.0.proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return get_peft_model_state_dict(model)


def test_adapters_are_loaded_fused_and_taken_out(
    pipe: SparseForcingPipeline, expected: np.ndarray, tmp_path: Path
) -> None:
    layers = make_adapters(pipe.transformer)
    SparseForcingPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    pipe.load_lora_weights(str(tmp_path), adapter_name="style")
    assert pipe.get_active_adapters() == ["style"]
    adapted = run(pipe)
    assert np.abs(adapted - expected).max() > 1e-3
    pipe.disable_lora()
    np.testing.assert_array_equal(run(pipe), expected)
    pipe.enable_lora()
    pipe.fuse_lora()
    np.testing.assert_allclose(run(pipe), adapted, atol=1e-3)
    pipe.unfuse_lora()
    np.testing.assert_allclose(run(pipe), adapted, atol=1e-3)
    pipe.unload_lora_weights()
    np.testing.assert_allclose(run(pipe), expected, atol=1e-3)


def test_pickled_adapters_are_refused(pipe: SparseForcingPipeline, tmp_path: Path) -> None:
    torch.save(make_adapters(pipe.transformer), tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(OSError, match="safetensors"):
        pipe.load_lora_weights(str(tmp_path))
    with pytest.raises(ConfigError, match="use_safetensors"):
        pipe.load_lora_weights(str(tmp_path), use_safetensors=False)


# Wan's parts, and Wan's pipeline


def test_diffusers_own_pipeline_makes_the_same_video_with_this_transformer() -> None:
    """A chunk of the video's length attends both ways, so one step loop or the other must not matter."""
    ours = make_wan(chunk_frames=3)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    theirs = WanPipeline(**ours.components | {"scheduler": scheduler})
    noise, text, empty = torch.randn(1, 3, 16, 4, 4), torch.randn(1, 512, 16), torch.randn(1, 512, 16)
    ours.encode_prompt = lambda prompts: empty  # type: ignore[method-assign]
    expected = theirs(
        prompt_embeds=text,
        negative_prompt_embeds=empty,
        latents=noise.transpose(1, 2),
        num_inference_steps=3,
        guidance_scale=4.0,
        height=32,
        width=32,
        num_frames=9,
        output_type="np",
    ).frames
    frames = ours(prompt_embeds=text, latents=noise).frames
    assert frames.shape == expected.shape == (1, 9, 32, 32, 3)
    np.testing.assert_allclose(frames, expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["model", "block_level", "leaf_level"])
def test_wans_parts_can_be_offloaded(kind: str, tmp_path: Path) -> None:
    pipe = make_wan(chunk_frames=1)
    inputs = {"prompt_embeds": torch.randn(1, 512, 16), "latents": torch.randn(1, 3, 16, 4, 4), "guidance_scale": 1.0}
    expected = pipe(**inputs).frames
    if kind == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        pipe.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_type=kind,
            num_blocks_per_group=1,
            offload_to_disk_path=str(tmp_path),
        )
    np.testing.assert_allclose(pipe(**inputs).frames, expected, atol=1e-5)


def test_the_patch_autoencoder_is_a_component_too(tmp_path: Path) -> None:
    pipe = make_pipe(vae=PatchAutoencoder(16))
    pipe.defaults = SparseForcingPipeline(**pipe.components).defaults
    pipe.save_pretrained(tmp_path / "model")
    assert isinstance(load(tmp_path / "model").vae, PatchAutoencoder)


def test_the_command_offloads_what_diffusers_offloads(pipe: SparseForcingPipeline, expected: np.ndarray) -> None:
    for kind in ("model", "blocks"):
        moved = copy.deepcopy(pipe)
        place(moved, GenerateConfig(offload=kind), "cpu", "cpu")  # type: ignore[arg-type]
        hooked = [name for name, part in moved.components.items() if hasattr(part, "_hf_hook")]
        assert hooked == (["transformer", "text_encoder", "vae"] if kind == "model" else [])
        assert hasattr(moved.transformer.blocks[0], "_diffusers_hook") == (kind == "blocks")
        np.testing.assert_array_equal(run(moved), expected)
    with pytest.raises(ConfigError, match="--offload blocks moves parts between a GPU and the CPU"):
        check_placement(GenerateConfig(offload="blocks"), pipe.defaults, "cpu")
