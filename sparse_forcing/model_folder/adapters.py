"""Low-rank adapters (LoRA) of published models: read under any of their names, merged into weights or kept beside them.

A layer W becomes W + scale B A. `adapter/` in a model folder holds adapters that are kept, in peft's format; they are
added to the weights whenever the model is loaded, so that everything that follows sees one plain model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.files import atomic_path, atomic_write_json, read_json
from sparse_forcing.model_folder.keys import abbreviate, select_state, strip_wrappers, wan_to_diffusers_key
from sparse_forcing.weights.safe_load import MAX_CONFIG_BYTES, load_weights, not_finite

ADAPTER = "adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT = "base_model.model."
_OTHER_KINDS = ("use_rslora", "use_dora", "use_qalora", "fan_in_fan_out", "modules_to_save", "bias", "lora_bias")
_ABSENT: tuple[Any, ...] = (None, False, "none", [])
"""What those settings of peft are in an adapter that is up @ down times alpha / rank and nothing else."""
_KEY = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight")


@dataclass(frozen=True)
class Adapter:
    """Of one linear layer: down [rank, in], up [out, rank]; the layer's change is scale * up @ down."""

    down: Tensor
    up: Tensor
    scale: float

    def change(self) -> Tensor:
        """[out, in] in float64."""
        return self.scale * (self.up.double() @ self.down.double())


def read_adapters(path: Path, scale: float = 1.0) -> tuple[dict[str, Adapter], list[str]]:
    """Adapters by diffusers' names of the layers, and what to remark on, from a file of peft, LongLive or ComfyUI.

    Args:
        scale: of the whole change, on top of alpha / rank; alpha is the rank where the file does not hold it.

    Raises:
        WeightsError: names or shapes that make no adapters of a Wan model.
    """
    state = select_state(load_weights(path), None, source=str(path))
    if bad := not_finite(state):
        raise WeightsError(f"{path}: tensor {bad} holds NaN or infinite numbers; the adapter cannot be used")
    sides: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in state.items():
        plain = strip_wrappers(strip_wrappers(key).removeprefix(_PEFT))
        match = _KEY.fullmatch(plain)
        module, side = match.groups() if match else (plain.removesuffix(".alpha"), "alpha")
        name = _layer(module)
        if name is None or not (match or plain.endswith(".alpha")):
            unknown.append(key)
            continue
        side = {"lora_down": "lora_A", "lora_up": "lora_B"}.get(side, side)
        sides.setdefault(name, {})[side] = tensor
    if unknown or not sides:
        raise WeightsError(f"{path}: not adapters of a Wan model; {abbreviate('unknown', unknown or list(state))}")
    stated = sum("alpha" in parts for parts in sides.values())
    remarks = [] if stated else [f"{path}: holds no alpha, which is taken to be the rank (--lora-scale changes it)"]
    return {name: _adapter(path, name, parts, scale) for name, parts in sides.items()}, remarks


def _layer(module: str) -> str | None:
    """diffusers' name of a linear layer under Wan's or diffusers' name."""
    if re.search(r"\.(attn[12]\.to_|ffn\.net\.)|^(condition_embedder|proj_out)\b", module):
        return module
    renamed = wan_to_diffusers_key(f"{module}.weight")
    return None if renamed is None else renamed.removesuffix(".weight")


def _adapter(path: Path, name: str, parts: Mapping[str, Tensor], scale: float) -> Adapter:
    down, up = parts.get("lora_A"), parts.get("lora_B")
    if down is None or up is None or down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
        raise WeightsError(f"{path}: the adapter of {name} lacks one of its two matrices, or they do not fit together")
    rank = down.shape[0]
    alpha = float(parts["alpha"]) if "alpha" in parts else float(rank)
    return Adapter(down, up, scale * alpha / rank)


def merge(state: dict[str, Tensor], adapters: Mapping[str, Adapter], source: Path) -> dict[str, Tensor]:
    """The state dict with every adapted weight W + scale B A, in W's type. Raises WeightsError for foreign layers."""
    out = dict(state)
    for name, adapter in adapters.items():
        weight = out.get(f"{name}.weight")
        if weight is None or weight.shape != (adapter.up.shape[0], adapter.down.shape[1]):
            raise WeightsError(f"{source}: the adapter of {name} is not one of this model's layers")
        out[f"{name}.weight"] = (weight.double() + adapter.change().to(weight.device)).to(weight.dtype)
    return out


def write_adapters(folder: Path, adapters: Mapping[str, Adapter]) -> None:
    """Write `folder`/adapter in peft's format, alpha of each layer included."""
    target = folder / ADAPTER
    target.mkdir(parents=True)
    ranks = {name: adapter.down.shape[0] for name, adapter in adapters.items()}
    alphas = {name: adapter.scale * ranks[name] for name, adapter in adapters.items()}
    first = next(iter(adapters))
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "target_modules": sorted(adapters),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    tensors = dict(_tensors(adapters))
    with atomic_path(target / WEIGHTS) as temporary:
        save_file(tensors, temporary)
    atomic_write_json(target / CONFIG, settings)


def _tensors(adapters: Mapping[str, Adapter]) -> Iterator[tuple[str, Tensor]]:
    for name, adapter in adapters.items():
        yield f"{_PEFT}{name}.lora_A.weight", adapter.down.contiguous()
        yield f"{_PEFT}{name}.lora_B.weight", adapter.up.contiguous()


def read_kept(folder: Path) -> dict[str, Adapter]:
    """The adapters that a model folder keeps, by layer; empty where it keeps none. Raises WeightsError."""
    target = folder / ADAPTER
    if not target.is_dir():
        return {}
    try:
        settings = read_json(target / CONFIG, max_bytes=MAX_CONFIG_BYTES)
        if other := [name for name in _OTHER_KINDS if settings.get(name) not in _ABSENT]:
            raise WeightsError(f"{target / CONFIG}: {other[0]} is set; only plain LoRA of linear layers is added here")
        rank, alpha = float(settings["r"]), float(settings["lora_alpha"])
        alphas, ranks = (settings.get(name) or {} for name in ("alpha_pattern", "rank_pattern"))
        found, _ = read_adapters(target / WEIGHTS)
        return {
            name: Adapter(each.down, each.up, float(alphas.get(name, alpha)) / float(ranks.get(name, rank)))
            for name, each in found.items()
        }
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise WeightsError(f"{target / CONFIG}: not the settings of an adapter ({error})") from error


@torch.no_grad()
def add_kept_adapters(model: nn.Module, folder: Path) -> None:
    """Add what `adapter/` of a model folder holds to the weights of its transformer, in place. Raises WeightsError."""
    if not (adapters := read_kept(folder)):
        return
    state = {name: value for name, value in model.state_dict().items() if name.removesuffix(".weight") in adapters}
    for name, value in merge(state, adapters, folder / ADAPTER).items():
        model.get_parameter(name).copy_(value)
