"""Weights written back as the programs they came from load them, and the check of all that a conversion wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparse_forcing.errors import WeightsError
from sparse_forcing.files import atomic_path, atomic_write_json
from sparse_forcing.model_folder.adapters import ADAPTER, merge, read_kept
from sparse_forcing.model_folder.keys import to_diffusers, to_wan
from sparse_forcing.model_folder.recognise import TRANSFORMER, check_supported, read_table
from sparse_forcing.weights.safe_load import check_safetensors, load_pt, load_safetensors

FORMATS = ("wan", "self-forcing")
WAN_FILE, SELF_FORCING_FILE = "diffusion_pytorch_model.safetensors", "model.pt"


def check_written(folder: Path, expected: Mapping[str, Tensor]) -> int:
    """Compare the safetensors files of a folder with the tensors they were written from; returns how many are equal.

    Raises:
        WeightsError: a tensor is missing, surplus or differs by a bit. Names that share their memory with a tensor that
            was written need no copy.
    """
    seen: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        check_safetensors(path)
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if name not in expected or not _same(file.get_tensor(name), expected[name]):
                    raise WeightsError(f"{path}: tensor {name} was not written as it was read; is the disk sound?")
                seen.add(name)
    there = {expected[name].data_ptr() for name in seen}
    if missing := [name for name, value in expected.items() if name not in seen and value.data_ptr() not in there]:
        raise WeightsError(f"{folder}: tensor {missing[0]} was not written; is the disk sound?")
    return len(seen)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def write_back(folder: Path, target: Path, form: str) -> tuple[int, list[str]]:
    """Write the transformer of a model folder as Wan's own program or Self-Forcing's loads it, bit by bit the same.

    Args:
        form: one of FORMATS. wan: `diffusion_pytorch_model.safetensors` and Wan's config.json; self-forcing: `model.pt`
            with the same tensors as `generator` and `generator_ema`.

    Returns:
        Number of tensors, and remarks.

    Raises:
        WeightsError: not a model folder, or tensors that Wan does not have.
    """
    if not (folder / TRANSFORMER).is_file():
        raise WeightsError(f"{folder}: not a model folder with a transformer, which is what --to writes back")
    check_supported(folder)
    config = read_table(folder / TRANSFORMER)
    state: dict[str, Tensor] = {}
    for path in sorted((folder / "transformer").glob("*.safetensors")):
        state.update(load_safetensors(path))
    remarks = [f"{folder}: text encoder, tokenizer and autoencoder are not written; those programs bring their own"]
    if adapters := read_kept(folder):
        state = merge(state, adapters, folder / ADAPTER)
        remarks.append(f"{folder / ADAPTER}: merged into the weights")
    wan = to_wan(state, source=str(folder))
    if not wan:
        raise WeightsError(f"{folder / 'transformer'}: holds no safetensors file")
    if form == "wan":
        with atomic_path(target / WAN_FILE) as temporary:
            save_file({name: x.contiguous() for name, x in wan.items()}, temporary, metadata={"format": "pt"})
        atomic_write_json(target / "config.json", wan_config(config))
        found = load_safetensors(target / WAN_FILE)
    else:
        named = {f"model.{name}": x for name, x in wan.items()}
        with atomic_path(target / SELF_FORCING_FILE) as temporary, temporary.open("wb") as file:
            torch.save({"generator": named, "generator_ema": named}, file)  # a file: what the disk says comes through
        found = load_pt(target / SELF_FORCING_FILE, mmap=True)["generator_ema"]
    again = to_diffusers(found, source=str(target))
    if again.keys() != state.keys() or not all(_same(again[name], state[name]) for name in state):
        raise WeightsError(f"{target}: was not written as it was read; is the disk sound?")
    return len(wan), remarks


def wan_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Wan's own config.json for a transformer's config in diffusers' words."""
    heads = config["num_attention_heads"]
    return {
        "_class_name": "WanModel",
        "model_type": "t2v",
        "text_len": 512,
        "in_dim": config["in_channels"],
        "dim": heads * config["attention_head_dim"],
        "ffn_dim": config["ffn_dim"],
        "freq_dim": config["freq_dim"],
        "out_dim": config["out_channels"],
        "num_heads": heads,
        "num_layers": config["num_layers"],
        "eps": config.get("eps", 1e-6),
    }
