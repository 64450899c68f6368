"""Recorded cases: a JSON that describes a run of a reference and a safetensors file with its inputs and outputs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sparse_forcing.model.flow import FlowSchedule
from sparse_forcing.model.transformer import CausalWanTransformer3DModel

DEFAULT_FOLDER = Path(__file__).parent / "data"

KINDS = (
    "wan_bidirectional",
    "causal_rollout",
    "causal_training_mask",
    "flow_scheduler",
    "rollout_pipeline",
    "dmd_loss",
    "dmd_generator",
    "aux_losses",
    "samplers",
    "vae_tiny",
)
"""Names that recorded files start with; `weights_*` and `configs.json` serve all of them."""

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Case:
    """One recorded case; tensors are read when asked for."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.path.read_text())

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.path.with_suffix(".safetensors"))

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The `in.*` tensors without the prefix, floating ones in `dtype`, timesteps always in float32."""
        found = {name[3:]: x for name, x in self.tensors.items() if name.startswith("in.")}
        return {
            name: x.to(dtype) if x.is_floating_point() and not name.startswith(("t", "aug_t")) else x
            for name, x in found.items()
        }

    def model(self, which: str, dtype: torch.dtype) -> CausalWanTransformer3DModel:
        """A fresh model with the recorded weights `weights_{which}_diffusers`."""
        config = model_config(self._beside("configs.json"), which)
        model = CausalWanTransformer3DModel(**config)
        model.load_state_dict(load_file(self._beside(f"weights_{which}_diffusers.safetensors")))
        return model.to(dtype)

    def _beside(self, name: str) -> Path:
        """A shared file: of the case's own folder, or of the default one where that has none."""
        here = self.path.with_name(name)
        return here if here.exists() else DEFAULT_FOLDER / name


def model_config(configs: Path, which: str) -> dict[str, Any]:
    """diffusers config of the model `A`, `generator` or `fake`."""
    models = json.loads(configs.read_text())["models"]
    for names, config in models.items():
        if which in names.replace("(", " ").replace(",", " ").split():
            return config["diffusers"]
    raise KeyError(which)


@lru_cache(maxsize=1)
def wan_key_table() -> dict[str, str]:
    """Wan key -> this project's key for up to 3 layers, as the reference recorded it."""
    return json.loads((DEFAULT_FOLDER / "configs.json").read_text())["key_list_A"]


def max_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, f"{list(found.shape)} instead of {list(expected.shape)}"
    return (found.double() - expected.double()).abs().max().item()


def assert_close(found: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    error = max_error(found, expected)
    assert error <= tolerance, f"{what}: off by {error:.2e}, more than {tolerance:.0e}"


def assert_gradient_norms(model: torch.nn.Module, norms: dict[str, float], tolerance: float) -> None:
    """Every parameter's gradient norm against recorded ones (Wan keys), relative."""
    parameters = dict(model.named_parameters())
    assert {wan_key_table()[key] for key in norms} == set(parameters)
    for key, norm in norms.items():
        gradient = parameters[wan_key_table()[key]].grad
        assert gradient is not None, f"{key}: no gradient"
        found = gradient.double().norm().item()
        assert abs(found - norm) <= tolerance * max(norm, 1e-3), f"{key}: gradient norm {found}, recorded {norm}"


def step_list(timesteps: list[float], shift: float) -> tuple[int, ...]:
    """Unshifted steps (1000, 750, ...) whose warped timesteps are these."""
    schedule = FlowSchedule(shift)
    steps = tuple((1000 - schedule.find_index(torch.tensor(timesteps))).tolist())
    assert_close(schedule.warp(list(steps)), torch.tensor(timesteps), 1e-2, "timesteps off the grid")
    return steps


def chunk_sizes(frames: int, size: int, first: int | None = None) -> list[int]:
    """Chunks of `size` frames that make up `frames`, the first one of `first`."""
    chunks = [first] if first else []
    chunks += [size] * ((frames - sum(chunks)) // size)
    assert sum(chunks) == frames
    return chunks


class RecordedNoise:
    """A rollout's randomness, replayed from recorded tensors."""

    def __init__(self, start: Tensor, fresh: list[Tensor]) -> None:
        self.start, self.draws, self.frame = start, list(fresh), 0

    def chunk(self, frames: int) -> Tensor:
        self.frame += frames
        return self.start[:, self.frame - frames : self.frame]

    def fresh(self, frames: int) -> Tensor:
        return self.draws.pop(0).reshape(self.start.shape[0], frames, *self.start.shape[2:])
