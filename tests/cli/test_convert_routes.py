"""Every route of `convert`, from a checkpoint to a folder that generates and back: what docs/real-weights.md says."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_forcing.cli import main
from sparse_forcing.model_folder.folder import load_transformer, read_defaults
from sparse_forcing.model_folder.keys import to_diffusers, wan_to_diffusers_key
from sparse_forcing.model_folder.self_forcing_config import read_inference_settings
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.weights.manifest import verify_manifest
from tests.taehv_file import published
from tests.wan_folder import HEAD_DIM, HEADS, VIDEO, WEIGHTS, wan_state, write_original, write_wan

DIM, RANK, ALPHA = HEADS * HEAD_DIM, 4, 6.0
FLAGS = [word for name, value in VIDEO.items() for word in (f"--{name.replace('_', '-')}", str(value))]
PAGE = Path(__file__).parents[2] / "docs" / "real-weights.md"
YAML = """
denoising_step_list:
- 1000
- 500
- 0
warp_denoising_step: true
num_frame_per_block: 3
independent_first_frame: true
context_noise: 10
model_kwargs:
  timestep_shift: 5.0
  local_attn_size: 6
  sink_size: 1
guidance_scale: 3.0
image_or_video_shape: [1, 21, 16, 4, 4]
use_ema: false
lr: 2.0e-06
trainer: score_distillation
"""


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wan(tmp_path_factory.mktemp("diffusers"))


@pytest.fixture(scope="module")
def original(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_original(wan, tmp_path_factory.mktemp("release") / "Wan2.1-T2V-1.3B")


@pytest.fixture
def checkpoint(wan: Path, tmp_path: Path) -> Path:
    """Self-Forcing's: two networks, with the prefixes that its wrappers leave."""
    path = tmp_path / "self_forcing_dmd.pt"
    named = {f"model.{key}": x for key, x in wan_state(wan).items()}
    ema = {key.replace("model.", "model._fsdp_wrapped_module."): x for key, x in named.items()}
    torch.save({"generator": {key: x + 1 for key, x in named.items()}, "generator_ema": ema, "step": 600}, path)
    return path


def lora_state(seed: int = 0) -> dict[str, Tensor]:
    """Adapters under peft's names of Wan's layers."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer in ("self_attn.q", "self_attn.o", "cross_attn.k", "ffn.0"):
        for block in range(2):
            name, out = f"base_model.model.model.blocks.{block}.{layer}", 64 if layer == "ffn.0" else DIM
            state[f"{name}.lora_A.weight"] = 0.3 * torch.randn(RANK, DIM, generator=generator)
            state[f"{name}.lora_B.weight"] = 0.3 * torch.randn(out, RANK, generator=generator)
    return state


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_original_release_becomes_a_folder_that_generates(
    wan: Path, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "wan-1.3b"
    code, out, err = run(capsys, "convert", original, model)
    assert code == 0
    assert "remark" not in err
    assert "sampled as wan-1.3b" in out
    for part in ("transformer", "text_encoder", "vae"):
        assert same(tensors(model / part), tensors(wan / part)), part
    assert verify_manifest(model)
    assert (
        main(
            [
                "generate",
                "a cat",
                "--model",
                str(model),
                "--output",
                str(tmp_path / "c.mp4"),
                *FLAGS,
                "--num-inference-steps",
                "2",
            ]
        )
        == 0
    )
    record = json.loads((tmp_path / "c.json").read_text())
    assert record["settings"]["sampler"] == "wan_unipc"
    assert record["settings"]["chunk_frames"] is None
    assert record["cache_bytes_peak"] == 0


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_a_self_forcing_checkpoint_generates_at_once(
    wan: Path, original: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    base = wan if layout == "diffusers" else original
    model = tmp_path / "sf"
    code, out, err = run(capsys, "convert", checkpoint, model, "--base", base, "--json")
    answer = json.loads(out)
    assert (code, answer["preset"]) == (0, "self-forcing")
    assert "generator_ema is taken, left out are generator, step" in err
    assert answer["sha256"] == verify_manifest(model)
    files = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()} - {"manifest.json"}
    assert answer["sha256"].keys() == files
    assert same(tensors(model / "transformer"), tensors(wan / "transformer"))
    if layout == "diffusers":
        assert os.path.samefile(model / "vae" / WEIGHTS, wan / "vae" / WEIGHTS)
    assert main(["generate", "a cat", "--model", str(model), "--output", str(tmp_path / "c.mp4"), *FLAGS]) == 0
    settings = json.loads((tmp_path / "c.json").read_text())["settings"]
    assert (settings["sampler"], settings["num_inference_steps"], settings["memory"]["kind"]) == ("few_step", 4, "full")


@pytest.mark.parametrize("wrap", ["{}", "module.{}", "model.diffusion_model.{}", "_orig_mod.{}"])
def test_plain_weights_under_every_prefix_are_sampled_as_wan(
    wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrap: str
) -> None:
    save_file({wrap.format(key): x for key, x in wan_state(wan).items()}, tmp_path / "w.safetensors")
    code, _, _ = run(capsys, "convert", tmp_path / "w.safetensors", tmp_path / "m", "--base", wan)
    assert code == 0
    assert read_defaults(tmp_path / "m").bidirectional
    assert same(tensors(tmp_path / "m" / "transformer"), tensors(wan / "transformer"))


def test_a_preset_is_written_and_generated_by(
    wan: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    framewise = "self-forcing-framewise"
    assert run(capsys, "convert", checkpoint, tmp_path / "m", "--base", wan, "--preset", framewise)[0] == 0
    pipe = SparseForcingPipeline.from_pretrained(str(tmp_path / "m"))
    assert (pipe.defaults.preset, pipe.geometry.chunk_frames) == (framewise, 1)
    assert pipe.transformer.config.chunk_frames == 1
    assert len(list(pipe.stream("a cat", **VIDEO))) == 3


def test_yaml_settings_are_read_into_the_folder(
    wan: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(YAML)
    code, _, err = run(capsys, "convert", checkpoint, tmp_path / "m", "--base", wan, "--config", tmp_path / "c.yaml")
    assert code == 0
    assert "not used here: lr, trainer" in err
    assert "guidance_scale 3 is the teacher's" in err
    pipe = SparseForcingPipeline.from_pretrained(str(tmp_path / "m"))
    config = pipe.defaults
    assert (config.sampler.step_list, config.sampler.shift, config.context_timestep) == ((1000, 500), 5.0, 10.0)
    assert (config.height, config.width, config.num_frames) == (32, 32, 81)
    assert (config.memory.kind, config.memory.window_frames, config.memory.sink_frames) == ("sink", 6, 1)
    assert pipe.geometry.chunks(7) == [1, 3, 3]
    first = next(iter(load_file(wan / "transformer" / WEIGHTS)))
    assert torch.equal(
        load_file(tmp_path / "m/transformer" / WEIGHTS)[first], load_file(wan / "transformer" / WEIGHTS)[first] + 1
    )
    assert main(["generate", "a cat", "--model", str(tmp_path / "m"), "--output", str(tmp_path / "c.mp4"), *FLAGS]) == 0


@pytest.mark.parametrize(
    ("lines", "remark"),
    [
        ("model_kwargs: {sink_size: 2, local_attn_size: -1}", "sink_size 2 has no effect without local_attn_size"),
        ("timestep_shift: 3.0\nmodel_kwargs: {timestep_shift: 5.0}", "not used here: timestep_shift"),
        ("warp_denoising_step: true", "not used here: warp_denoising_step"),
        ("denoising_step_list: [1000, 500]\nsampling_steps: 20", "not used here: sampling_steps"),
    ],
)
def test_what_yaml_says_in_vain_is_named(tmp_path: Path, lines: str, remark: str) -> None:
    (tmp_path / "c.yaml").write_text(lines + "\n")
    (said,) = read_inference_settings(tmp_path / "c.yaml").remarks
    assert said.endswith(remark)


@pytest.mark.parametrize("form", ["wan", "self-forcing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_written_back_bit_by_bit(
    wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, dtype: torch.dtype
) -> None:
    state = {key: x.to(dtype) for key, x in wan_state(wan).items()}
    torch.save({"generator": {f"model.{key}": x for key, x in state.items()}}, tmp_path / "w.pt")
    assert run(capsys, "convert", tmp_path / "w.pt", tmp_path / "m", "--base", wan)[0] == 0
    code, out, _ = run(capsys, "convert", tmp_path / "m", tmp_path / "back", "--to", form)
    assert code == 0
    assert f"{len(state)} tensors equal bit by bit" in out
    if form == "wan":
        found = load_file(tmp_path / "back" / WEIGHTS)
        config = json.loads((tmp_path / "back" / "config.json").read_text())
        assert (config["dim"], config["num_heads"], config["model_type"]) == (DIM, HEADS, "t2v")
    else:
        content = torch.load(tmp_path / "back" / "model.pt", weights_only=True)
        assert same(content["generator"], content["generator_ema"])
        found = {key.removeprefix("model."): x for key, x in content["generator"].items()}
    assert same(found, state)
    again = run(capsys, "convert", tmp_path / "back", tmp_path / "again", "--base", wan)
    assert again[0] == 0
    assert same(tensors(tmp_path / "again/transformer"), tensors(tmp_path / "m/transformer"))


def longlive(wan: Path, tmp_path: Path, *flags: str) -> Path:
    """LongLive's two files, converted."""
    model = tmp_path / f"m{len(flags)}"
    torch.save({"generator": {f"model.{key}": x for key, x in wan_state(wan).items()}}, tmp_path / "base.pt")
    torch.save({"generator_lora": lora_state()}, tmp_path / "lora.pt")
    arguments = ["convert", tmp_path / "base.pt", model, "--base", wan, "--lora", tmp_path / "lora.pt"]
    assert main([*map(str, arguments), *flags]) == 0
    return model


def test_an_adapter_merged_equals_one_kept_and_peft(wan: Path, tmp_path: Path) -> None:
    merged = longlive(wan, tmp_path, "--lora-scale", str(ALPHA / RANK))
    kept = longlive(wan, tmp_path, "--lora-scale", str(ALPHA / RANK), "--keep-lora")
    assert read_defaults(kept).preset == "longlive"
    assert same(tensors(kept / "transformer"), tensors(wan / "transformer"))
    assert (kept / "adapter" / "adapter_config.json").is_file()
    models = [load_transformer(folder).eval() for folder in (merged, kept)]
    reference = load_transformer(wan).eval()
    names = {wan_to_diffusers_key(f"{key.split('model.')[-1].rpartition('.lora_')[0]}.weight") for key in lora_state()}
    targets = sorted(str(name).removesuffix(".weight") for name in names)
    peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets), reference)  # type: ignore[arg-type]
    for key, value in lora_state().items():
        layer, side = key.split("model.")[-1].removesuffix(".weight").rsplit(".", 1)
        name = str(wan_to_diffusers_key(f"{layer}.weight")).removesuffix(".weight")
        reference.get_parameter(f"{name}.{side}.default.weight").data.copy_(value)
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 16, 3, 4, 4, generator=generator), torch.randn(1, 5, 32, generator=generator)
    with torch.no_grad():
        outputs = [model(x, torch.tensor([500.0]), text) for model in (*models, reference, load_transformer(wan))]
    for output in outputs[1:3]:
        torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=0)
    assert (outputs[3] - outputs[0]).abs().max() > 1e-2


def test_a_kept_adapter_is_merged_when_weights_are_written_back(
    wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = longlive(wan, tmp_path, "--keep-lora")
    code, _, err = run(capsys, "convert", kept, tmp_path / "back", "--to", "wan")
    assert code == 0
    assert "merged into the weights" in err
    found = to_diffusers(load_file(tmp_path / "back" / WEIGHTS))
    assert same(found, dict(load_transformer(kept).state_dict()))


def test_parts_are_converted_alone(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, part in (("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder"), ("Wan2.1_VAE.pth", "vae")):
        code, _, err = run(capsys, "convert", original / name, tmp_path / part)
        assert code == 0
        assert [path.name for path in sorted((tmp_path / part).iterdir())] == ["manifest.json", part]
        assert "still lacks transformer" in err


def test_a_folder_gets_an_adapter(wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comfy = {"base_model.model.model.": "diffusion_model.", "lora_A": "lora_down", "lora_B": "lora_up"}
    state = lora_state()
    for ours, theirs in comfy.items():
        state = {key.replace(ours, theirs): x for key, x in state.items()}
    save_file(state, tmp_path / "l.safetensors")
    code, _, err = run(capsys, "convert", wan, tmp_path / "m", "--lora", tmp_path / "l.safetensors")
    assert code == 0
    assert "holds no alpha" in err
    assert read_defaults(tmp_path / "m").sampler == read_defaults(wan).sampler
    assert SparseForcingPipeline.from_pretrained(str(tmp_path / "m"))


def changed(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    return {key: x for key, x in (state | changes).items() if x is not None}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"img_emb.proj.0.weight": torch.zeros(2)}, "an image-to-video Wan, by img_emb"),
        ({"vace_blocks.0.before_proj.weight": torch.zeros(2)}, "Wan VACE"),
        ({"blocks.0.self_attn.q.scale_weight": torch.zeros(1)}, "scaled 8-bit"),
        ({"patch_embedding.weight": torch.zeros(DIM, 36, 1, 2, 2)}, "36 input channels"),
        ({"patch_embedding.weight": torch.zeros(DIM, 48, 1, 2, 2)}, "TI2V-5B"),
        ({"head.head.bias": torch.full((64,), float("nan"))}, "holds NaN"),
        ({"mystery.weight": torch.zeros(2)}, "unknown: mystery.weight"),
    ],
)
def test_other_weights_are_refused_and_nothing_is_written(
    wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: dict[str, Tensor], message: str
) -> None:
    save_file(wan_state(wan) | extra, tmp_path / "w.safetensors")
    code, _, err = run(capsys, "convert", tmp_path / "w.safetensors", tmp_path / "m", "--base", wan)
    assert code == 2
    assert message in err
    assert str(tmp_path / "w.safetensors") in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("name", ["models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"])
def test_parts_of_no_numbers_are_refused(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    state = torch.load(original / name)
    next(iter(state.values())).view(-1)[0] = float("inf")
    torch.save(state, tmp_path / name)
    code, _, err = run(capsys, "convert", tmp_path / name, tmp_path / "m")
    assert (code, "holds NaN or infinite" in err, (tmp_path / "m").exists()) == (2, True, False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base", "EMPTY"], "has no text_encoder and no tokenizer and no vae to take"),
        (["--base", "tiny"], "no such model folder"),
        (["--config", "YAML", "--preset", "causvid"], "--preset or --config"),
        (["--config", "NONE"], "no such file"),
        (["--keep-lora"], "no effect without --lora"),
        (["--lora", "YAML"], "unknown kind of weight file"),
        (["--to", "wan"], "not a model folder"),
        (["--to", "wan", "--preset", "causvid"], "--preset has no effect with --to"),
        (["--part", "critic"], "has no part 'critic'"),
    ],
)
def test_requests_that_cannot_be_met_are_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "YAML").write_text(YAML)
    words = [tmp_path / word if word.isupper() else word for word in flags]
    code, _, err = run(capsys, "convert", checkpoint, tmp_path / "m", *words)
    assert (code, (tmp_path / "m").exists()) == (2, False)
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("denoising_step_list: [1000, x]", "denoising_step_list: whole numbers"),
        ("denoising_step_list: [0]", "holds no step"),
        ("denoising_step_list: [2000]", "entries from 1 to 1000"),
        ("num_frame_per_block: -1", "chunk_frames"),
        ("timestep_shift: 0", "sampler.shift"),
        ("model_kwargs: 3", "model_kwargs: cannot be 3"),
        ("image_or_video_shape: [1, 2]", "five whole numbers"),
        ("a: *b", "YAML"),
    ],
)
def test_yaml_that_makes_no_sense_is_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    (tmp_path / "c.yaml").write_text(line + "\n")
    code, _, err = run(capsys, "convert", checkpoint, tmp_path / "m", "--config", tmp_path / "c.yaml")
    assert (code, (tmp_path / "m").exists()) == (2, False)
    assert message in err or message == "YAML"
    assert str(tmp_path / "c.yaml") in err
    assert len(err.strip().splitlines()) == 1


def test_parts_of_another_size_are_refused(
    wan: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(wan, base)
    path = base / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"d_model": 64}))
    code, _, err = run(capsys, "convert", checkpoint, tmp_path / "m", "--base", base)
    assert (code, (tmp_path / "m").exists()) == (2, False)
    assert "text_dim 32, text_encoder d_model 64" in err


COMMAND = re.compile(r"^sparse-forcing (.+?)(?:\s+#.*)?$", re.MULTILINE)


def test_every_command_of_the_page_on_real_weights(
    wan: Path, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(original, "Wan2.1-T2V-1.3B")
    named = {f"model.{key}": x for key, x in wan_state(wan).items()}
    for name in ("self_forcing_dmd.pt", "causvid.pt", "longlive_base.pt"):
        torch.save({"generator": named}, name)
    torch.save({"generator_lora": lora_state()}, "lora.pt")
    save_file({f"model.diffusion_model.{key}": x for key, x in wan_state(wan).items()}, "wan_comfyui.safetensors")
    Path("self_forcing_dmd.yaml").write_text(YAML)
    torch.save(published(), "taew2_1.pth")
    commands = COMMAND.findall(PAGE.read_text(encoding="utf-8"))
    assert len(commands) == 21
    Path("prompts.txt").write_text("a red circle\na blue star\n")
    for command in commands:
        words = shlex.split(command)
        assert main([*words, *(FLAGS if words[0] == "generate" else [])]) == 0, command
    assert len(list(Path("outputs").glob("*.mp4"))) == 1
