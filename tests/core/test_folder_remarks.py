"""Nothing that a model folder says is dropped in silence: it is used, refused, or remarked on in one line."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_forcing.errors import WeightsError
from sparse_forcing.model_folder.adapters import Adapter, add_kept_adapters, write_adapters
from sparse_forcing.model_folder.folder import EMBEDDED_MODELS, load_transformer
from sparse_forcing.model_folder.presets import PRESETS
from sparse_forcing.model_folder.remarks import folder_remarks
from sparse_forcing.weights.manifest import write_manifest
from tests.wan_folder import load, write_wan

INDEX, TRANSFORMER, VAE = "model_index.json", "transformer/config.json", "vae/config.json"
TEXT, TOKENIZER = "text_encoder/config.json", "tokenizer/tokenizer_config.json"
SCHEDULER = "scheduler/scheduler_config.json"
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}
SELF_FORCING = {"_class_name": "SelfForcingFlowMatchScheduler", "shift": 5.0, "extra_one_step": True}


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def folder(wan: Path, tmp_path: Path) -> Path:
    shutil.copytree(wan, tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folders_as_they_are_published_need_no_remark(folder: Path) -> None:
    assert [folder_remarks(each) for each in EMBEDDED_MODELS.glob("tiny*")] == [[], []]
    assert folder_remarks(folder) == []
    parts = {"transformer_2": [None, None], "image_encoder": [None, None], "boundary_ratio": None}
    edit(folder, INDEX, **parts, expand_timesteps=False)
    edit(folder, TEXT, output_past=True, scalable_attention=True, tokenizer_class="T5Tokenizer", torch_dtype="bfloat16")
    edit(folder, TOKENIZER, tokenizer_class="T5TokenizerFast", extra_ids=299, model_max_length=512)
    edit(folder, SCHEDULER, solver_order=2, timestep_spacing="linspace", use_karras_sigmas=False, flow_shift=8.0)
    assert folder_remarks(folder) == []


@pytest.mark.parametrize(
    ("name", "changes", "remark"),
    [
        (TRANSFORMER, {"attention_kind": "x", "quantization_config": {}}, "not used: attention_kind"),
        (
            TRANSFORMER,
            {"rope_max_seq_len": 512},
            "not used: rope_max_seq_len=512, positions are computed for any length",
        ),
        (TRANSFORMER, {"num_frame_per_block": 3, "local_attn_size": -1}, "not used: num_frame_per_block"),
        (VAE, {"depth_bands": 3}, "not used: depth_bands"),
        (VAE, {"_class_name": "AutoencoderKLOther"}, "not used: _class_name=AutoencoderKLOther, it is read as"),
        (TEXT, {"relative_shift": 3}, "not used: relative_shift"),
        (TEXT, {"model_type": "t5"}, "not used: model_type=t5, it is read as umt5"),
        (TOKENIZER, {"reversed": True}, "not used: reversed"),
        (TOKENIZER, {"model_max_length": 77}, "not used: model_max_length=77, prompts have up to 512"),
        (TOKENIZER, {"tokenizer_class": "Unheard"}, "not used: tokenizer_class=Unheard, which transformers does not"),
        (INDEX, {"controlnet": ["diffusers", "ControlNetModel"]}, "not used: controlnet=ControlNetModel"),
        (INDEX, {"expand_timesteps": True}, "not used: expand_timesteps=True"),
        (INDEX, {"_class_name": "OtherPipeline"}, "not used: _class_name=OtherPipeline"),
        (INDEX, {"vae": ["diffusers", "AutoencoderKL"]}, "not used: vae=AutoencoderKL"),
        (SCHEDULER, {"prediction_type": "epsilon"}, "not used: prediction_type=epsilon"),
        (SCHEDULER, {"solver_order": 3, "use_karras_sigmas": True}, "not used: solver_order=3, use_karras_sigmas=True"),
        (SCHEDULER, {"timestep_spacing": "trailing"}, "not used: timestep_spacing=trailing"),
        (SCHEDULER, {"thermostat": 1}, "not used: thermostat=1"),
        (SCHEDULER, {"_class_name": "DDIMScheduler"}, "DDIMScheduler is not known; UniPC is used in its place"),
    ],
)
def test_a_setting_without_effect_is_one_line(folder: Path, name: str, changes: dict, remark: str) -> None:
    edit(folder, name, **changes)
    (said,) = folder_remarks(folder)
    assert said.startswith(f"{folder / name}: {remark}")
    assert "\n" not in said


def test_what_other_schedulers_say(folder: Path) -> None:
    path = folder / SCHEDULER
    path.write_text(json.dumps(EULER))
    assert folder_remarks(folder) == []
    path.write_text(json.dumps(EULER | {"use_dynamic_shifting": True, "base_shift": 0.5}))
    assert folder_remarks(folder) == [f"{path}: not used: use_dynamic_shifting=True"]
    edit(folder, TRANSFORMER, _class_name="CausalWanTransformer3DModel")
    for unused in (EULER, {"_class_name": "Unheard"}):
        path.write_text(json.dumps(unused))
        assert folder_remarks(folder) == [
            f"{path}: not used, causal weights are sampled in a few steps (see --sampler)"
        ]
    path.write_text(json.dumps(SELF_FORCING))
    assert folder_remarks(folder) == []
    path.write_text(json.dumps(SELF_FORCING | {"sigma_min": 0.1}))
    assert folder_remarks(folder) == [f"{path}: not used: sigma_min=0.1"]


def test_windows_and_chunks_are_used_only_where_nothing_else_says_how_to_sample(folder: Path) -> None:
    says = {"num_frame_per_block": 3, "local_attn_size": 9, "sink_size": 3}
    edit(folder, TRANSFORMER, _class_name="CausalWanTransformer3DModel", **says)
    shutil.rmtree(folder / "scheduler")
    assert folder_remarks(folder) == []
    edit(folder, TRANSFORMER, local_attn_size=-1)
    assert folder_remarks(folder) == [f"{folder / TRANSFORMER}: not used: sink_size"]
    edit(folder, TRANSFORMER, **says)
    unused = f"{folder / TRANSFORMER}: not used: local_attn_size, num_frame_per_block, sink_size"
    edit(folder, TRANSFORMER, selector_tokens=8)
    assert folder_remarks(folder) == [unused]
    edit(folder, TRANSFORMER, selector_tokens=None)
    (folder / "pipeline.json").write_text("{}")
    assert folder_remarks(folder) == [unused]


def test_what_a_manifest_says_beside_hashes_is_one_line(folder: Path) -> None:
    write_manifest(folder)
    assert folder_remarks(folder) == []
    edit(folder, "manifest.json", signature="x", made_by="y")
    assert folder_remarks(folder) == [f"{folder / 'manifest.json'}: not used: made_by, signature"]


def test_parts_and_files_that_are_not_used(folder: Path) -> None:
    (folder / "controlnet").mkdir()
    (folder / "style.safetensors").touch()
    assert folder_remarks(folder) == [
        f"{folder}: parts that are not used: controlnet",
        f"{folder}: weights that are not used: style.safetensors",
    ]


def test_a_scheduler_beside_our_own_settings_is_not_used(folder: Path) -> None:
    from dataclasses import asdict

    (folder / "pipeline.json").write_text(json.dumps(asdict(PRESETS["self-forcing"])))
    assert folder_remarks(folder) == [f"{folder / SCHEDULER}: not used, pipeline.json says how videos are sampled"]


def test_loading_says_every_remark_once_and_nothing_else(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in (TRANSFORMER, VAE, TEXT):
        edit(folder, name, unheard=1, **({"model_type": "t5"} if name == TEXT else {}))
    weights = folder / "text_encoder" / "model.safetensors"
    decoder = {f"decoder.block.{i}.weight": torch.zeros(2) for i in range(6)}
    save_file(load_file(weights) | decoder, weights, metadata={"format": "pt"})
    capfd.readouterr()
    for options, tensors in (
        ({}, True),
        ({"prompts": ["a cat"]}, True),
        ({"text_encoder": torch.nn.Identity()}, False),
    ):
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            load(folder, **options)
        said = [str(each.message) for each in shown if str(folder) in str(each.message)]
        surplus = f"{folder / 'text_encoder'}: tensors that are not used: "
        assert sorted(said) == sorted(
            [*folder_remarks(folder)] + ([surplus + ", ".join(sorted(decoder)[:5]) + " and 1 more"] if tensors else [])
        )
        assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("side", ["padding_side", "truncation_side"])
def test_prompts_are_padded_and_cut_on_the_right(folder: Path, side: str) -> None:
    edit(folder, TOKENIZER, **{side: "left"})
    with pytest.raises(WeightsError, match=f"{side} is 'left'"):
        load(folder)


@pytest.mark.parametrize(
    ("part", "method"), [("text_encoder", "bitsandbytes"), ("transformer", "unheard"), ("vae", "unheard")]
)
def test_a_quantizer_that_is_not_there_is_one_line(folder: Path, part: str, method: str) -> None:
    edit(folder, f"{part}/config.json", quantization_config={"quant_method": method, "load_in_8bit": True})
    with pytest.raises(WeightsError, match=str(folder)) as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("setting", [{"use_rslora": True}, {"bias": "all"}, {"modules_to_save": ["proj_out"]}])
def test_adapters_of_another_kind_are_refused(folder: Path, setting: dict[str, Any]) -> None:
    down = torch.ones(2, 48)
    write_adapters(folder, {"blocks.0.attn1.to_q": Adapter(down, down.T.contiguous(), 1.0)})
    model = load_transformer(folder)
    edit(folder, "adapter/adapter_config.json", **setting)
    with pytest.raises(WeightsError, match=f"{next(iter(setting))} is set; only plain LoRA"):
        add_kept_adapters(model, folder)
