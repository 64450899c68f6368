"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) through peft: only they train; exports merge them.

A layer W becomes W + (alpha / rank) B A. A checkpoint holds A and B alone and names the base it belongs to. Learned
block selectors, which are small and may have nothing to start from, train whole beside the adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparse_forcing.errors import ConfigError
from sparse_forcing.files import atomic_path, explain_full_disk
from sparse_forcing.training.engine.parallel import shard_like

_NAME = "default"
ATTENTION_AND_FEED_FORWARD = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters of one network.

    Args:
        rank: rank of the change of every layer; alpha: the change is scaled by alpha / rank.
        targets: ends of the names of the linear layers that get one.
    """

    rank: int = 64
    alpha: float = 64.0
    targets: tuple[str, ...] = ATTENTION_AND_FEED_FORWARD

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not self.targets:
            raise ConfigError("rank must be at least 1, alpha positive, and targets not empty")

    def find_adapted(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The linear layers that get an adapter. Raises ConfigError for a target that no layer answers to."""
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        for target in self.targets:
            if not any(_answers(name, target) for name in linear):
                raise ConfigError(f"targets: no linear layer of the model is named ...{target}")
        return {n: m for n, m in linear.items() if any(_answers(n, target) for target in self.targets)}

    def parameter_count(self, model: nn.Module) -> int:
        """Numbers that the adapters add to `model`."""
        return sum(self.rank * (x.in_features + x.out_features) for x in self.find_adapted(model).values())


def _trains(name: str) -> bool:
    return ".lora_" in name or ".selector." in name


def _answers(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def add_adapters(model: nn.Module, config: LoraConfig, seed: int) -> None:
    """Give the target layers adapters (B zero, so that nothing changes yet) and freeze everything else but the learned
    selectors, in place.

    Every process draws the same A from `seed`. Raises ConfigError when peft is missing or a target names no layer.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError('lora: needs peft; install it with: pip install "sparse-forcing[train]"') from error
    names = list(config.find_adapted(model))
    alpha: Any = config.alpha  # peft's annotation says int; any number works
    settings = peft.LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model, _NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_trains(name))


class AdapterState:
    """What trains of a model with adapters, as a part of a checkpoint.

    Args:
        base: hash of the weights under the adapters; loading adapters of another base is refused.
    """

    def __init__(self, model: nn.Module, base: str | None) -> None:
        self.model, self.base = model, base

    def _own(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if _trains(name)}

    def state_dict(self) -> dict[str, Any]:
        return {**{name: p.detach() for name, p in self._own().items()}, "__base__": self.base}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError (a WeightsError of the checkpoint) when the adapters belong to other layers or weights."""
        own, state = self._own(), dict(state)
        base = state.pop("__base__")
        if base != self.base:
            raise ValueError(f"adapters were trained on base weights {base}, these are {self.base}")
        if state.keys() != own.keys():
            raise ValueError(f"adapters differ: {sorted(state.keys() ^ own.keys())[:4]}")
        for name, parameter in own.items():
            if state[name].shape != parameter.shape:
                raise ValueError(f"{name}: shape {list(state[name].shape)}, expected {list(parameter.shape)}")
            parameter.copy_(shard_like(state[name], parameter))


def merge_adapters(state: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """A state dict with adapters -> the plain model's: every adapted weight W + (alpha / rank) B A in W's type."""
    plain = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        layer, inside, leaf = name.partition(".base_layer.")
        if inside and leaf == "weight":
            a, b = (state[f"{layer}.lora_{x}.{_NAME}.weight"] for x in "AB")
            value = (value.double() + config.alpha / config.rank * (b.double() @ a.double())).to(value.dtype)
        plain[f"{layer}.{leaf}" if inside else name] = value
    return plain


def save_adapters(folder: Path, state: dict[str, Tensor], model: nn.Module) -> None:
    """Write the adapters alone in peft's format: adapter_config.json and adapter_model.safetensors.

    A learned selector is no adapter: it is in the merged model only.
    """
    import peft

    folder.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(folder):
        model.peft_config[_NAME].save_pretrained(str(folder))  # type: ignore[index,union-attr]
    tensors = peft.get_peft_model_state_dict(model, state_dict=state, adapter_name=_NAME)
    with atomic_path(folder / "adapter_model.safetensors") as temporary:
        save_file({name: x.contiguous() for name, x in tensors.items()}, temporary)
