"""Original checkpoints -> diffusers folders: every wrapper, every container, strict about everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_forcing.errors import WeightsError
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model_folder.convert import ConvertOptions, convert, load_transformer
from sparse_forcing.model_folder.keys import (
    diffusers_to_wan_key,
    infer_config,
    select_state,
    to_diffusers,
    to_wan,
    wan_to_diffusers_key,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
HEAD_DIM = 32
SIZES = [{}, {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}]


@pytest.fixture
def wan() -> dict[str, Tensor]:
    return load_file(GOLDEN / "weights_generator_wan.safetensors")


@pytest.fixture
def diffusers() -> dict[str, Tensor]:
    return load_file(GOLDEN / "weights_generator_diffusers.safetensors")


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("sizes", SIZES, ids=["1.3B", "14B"])
def test_released_sizes_both_ways(sizes: dict[str, Any]) -> None:
    with torch.device("meta"):
        state = CausalWanTransformer3DModel(**sizes).state_dict()
    original = to_wan(state)
    assert len(original) == len(state) == (1095 if sizes else 825)
    back = to_diffusers(original)
    assert list(back) == list(state)
    config = infer_config(back)
    assert config["num_layers"] == (40 if sizes else 30)
    with torch.device("meta"):
        assert CausalWanTransformer3DModel(**config).state_dict().keys() == state.keys()


@pytest.mark.parametrize(
    "wrap",
    [
        "{}",
        "model.{}",
        "model._fsdp_wrapped_module.{}",
        "_orig_mod.model.{}",
        "module.{}",
        "module.model.{}",
        "model.diffusion_model.{}",
        "diffusion_model.{}",
        "model._fsdp_wrapped_module._checkpoint_wrapped_module.{}",
    ],
)
def test_prefixes_of_training_wrappers(wan: dict, diffusers: dict, wrap: str) -> None:
    assert same(to_diffusers({wrap.format(key): x for key, x in wan.items()}), diffusers)


def test_wrappers_inside_block_names(wan: dict, diffusers: dict) -> None:
    def inner(key: str) -> str:
        head, _, rest = key.partition(".self_attn.")
        return f"{head}._checkpoint_wrapped_module.self_attn.{rest}" if rest else key

    assert same(to_diffusers({f"model.{inner(key)}": x for key, x in wan.items()}), diffusers)


def test_diffusers_keys_pass_through(diffusers: dict) -> None:
    assert same(to_diffusers({f"model.{key}": x for key, x in diffusers.items()}), diffusers)


def test_swapped_norm_is_swapped_once() -> None:
    assert wan_to_diffusers_key("blocks.3.norm3.weight") == "blocks.3.norm2.weight"
    assert diffusers_to_wan_key("blocks.3.norm2.weight") == "blocks.3.norm3.weight"


@pytest.mark.parametrize(
    "key",
    [
        "",
        "blocks.0",
        "blocks.x.modulation",
        "blocks.0.head.modulation",
        "head.modulation.weight",
        "modulation",
        "blocks.0.ffn.1.weight",
        "blocks.0.self_attn.q.scale",
        "head.head",
        "blocks.0.norm1.weight",
    ],
)
def test_names_that_wan_does_not_have(key: str) -> None:
    assert wan_to_diffusers_key(key) is None


@pytest.mark.parametrize(
    ("names", "chosen"),
    [(["generator"], "generator"), (["critic", "generator", "generator_ema"], "generator_ema"), (["critic"], "critic")],
)
def test_preferred_part_of_a_checkpoint(names: list[str], chosen: str) -> None:
    content = {name: {"x": torch.tensor(i)} for i, name in enumerate(names)}
    assert select_state(content)["x"] == names.index(chosen)
    assert select_state(content, names[0])["x"] == 0


def test_part_that_is_not_there() -> None:
    with pytest.raises(WeightsError, match=r"no part 'ema'; it has generator"):
        select_state({"generator": {"x": torch.zeros(1)}}, "ema")
    with pytest.raises(WeightsError, match="single state dict"):
        select_state({"x": torch.zeros(1)}, "generator")
    with pytest.raises(WeightsError, match="not tensors: step"):
        select_state({"x": torch.zeros(1), "step": 3})


@pytest.mark.parametrize("layout", ["pt", "safetensors", "shards"])
def test_files_and_folders(tmp_path: Path, wan: dict, diffusers: dict, layout: str) -> None:
    source = tmp_path / "source.pt"
    if layout == "pt":
        torch.save({"generator_ema": {f"model.{key}": x for key, x in wan.items()}, "critic": {}}, source)
    elif layout == "safetensors":
        source = source.with_suffix(".safetensors")
        save_file(wan, source)
    else:
        source = tmp_path / "shards"
        source.mkdir()
        for i in range(2):
            save_file({key: wan[key] for key in sorted(wan)[i::2]}, source / f"part-{i}.safetensors")
    done = convert(source, tmp_path / "out", ConvertOptions(head_dim=HEAD_DIM))
    assert done.tensors == len(diffusers)
    assert done.preset == ("self-forcing" if layout == "pt" else "wan-1.3b")
    model = CausalWanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer")
    assert same(dict(model.state_dict()), diffusers)
    assert model.config.attention_head_dim == HEAD_DIM


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("blocks.1.self_attn.q.weight"), r"missing: blocks\.1\.attn1\.to_q\.weight"),
        (lambda s: s.update({"blocks.0.lora.weight": torch.zeros(1)}), r"unknown: blocks\.0\.lora\.weight"),
        (lambda s: s.update({"blocks.1.ffn.0.bias": torch.zeros(3)}), r"wrong shape: blocks\.1\.ffn.* \[3\] instead"),
        (lambda s: s.update({"head.head.bias": s["head.head.bias"].long()}), r"not floating point: proj_out\.bias"),
        (lambda s: s.update({"model.head.head.bias": torch.zeros(64)}), "same name"),
        (lambda s: s.pop("patch_embedding.weight"), r"missing or misshapen: 'patch_embedding\.weight'"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks.1.self_attn")], r"and \d+ more"),
    ],
    ids=["missing", "extra", "shape", "dtype", "twice", "no patch", "many"],
)
def test_misfits_are_named_and_nothing_is_written(tmp_path: Path, wan: dict, damage: Any, message: str) -> None:
    damage(wan)
    torch.save(wan, tmp_path / "bad.pt")
    with pytest.raises(WeightsError, match=message):
        convert(tmp_path / "bad.pt", tmp_path / "out", ConvertOptions(head_dim=HEAD_DIM))
    assert not (tmp_path / "out").exists()


def test_code_in_a_pickle_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple:
            return Path.touch, (marker,)

    torch.save({"generator": Payload()}, tmp_path / "hostile.pt")
    with pytest.raises(WeightsError, match="refused"):
        load_transformer(tmp_path / "hostile.pt")
    assert not marker.exists()


def test_empty_folder_and_wrong_head_dim(tmp_path: Path, wan: dict) -> None:
    with pytest.raises(WeightsError, match="no weight file"):
        load_transformer(tmp_path)
    save_file(wan, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="head dimension 128"):
        load_transformer(tmp_path / "w.safetensors")
