"""Self-Forcing's YAML configs (CausVid's and LongLive's, too) as defaults of a model: what they say of inference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparse_forcing.config import read_settings
from sparse_forcing.errors import ConfigError
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model_folder.defaults import PipelineConfig
from sparse_forcing.model_folder.presets import PRESETS, WAN_STEPS
from sparse_forcing.model_folder.recognise import window_memory

_STRIDES = (4, 8)  # of Wan 2.1's autoencoder: pixel frames, then pixels, of a latent one


@dataclass(frozen=True, kw_only=True)
class InferenceSettings:
    """What Self-Forcing's YAML says of inference.

    defaults: of the model; part: of the checkpoint, None where the file does not say; lora_scale: alpha / rank;
    remarks: settings that have no effect here.
    """

    defaults: PipelineConfig
    part: str | None
    lora_scale: float | None
    remarks: list[str]


class _Settings:
    """A YAML file's settings that remembers which of them somebody asked for."""

    def __init__(self, path: Path, tree: Mapping[str, Any], prefix: str = "") -> None:
        self.path, self.tree, self.prefix, self.asked = path, tree, prefix, set[str]()

    def get(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The value of a setting. Raises ConfigError when it is of another kind."""
        self.asked.add(name)
        value = self.tree.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{self.path}: {self.prefix}{name}: cannot be {value!r:.60}")
        return value

    def group(self, name: str) -> _Settings:
        return _Settings(self.path, self.get(name, Mapping, {}), f"{self.prefix}{name}.")

    def rest(self) -> list[str]:
        return [f"{self.prefix}{name}" for name in self.tree if name not in self.asked]


def read_inference_settings(path: Path) -> InferenceSettings:
    """What a YAML file of Self-Forcing says of inference; everything else is remarked on by name.

    Raises:
        ConfigError: the file cannot be read, or a setting makes no sense.
    """
    settings = _Settings(path, read_settings(path))
    kwargs, adapter = settings.group("model_kwargs"), settings.group("adapter")
    shift = kwargs.get("timestep_shift", (int, float))
    if shift is None:
        shift = settings.get("timestep_shift", (int, float), 8.0)
    try:
        sampler, remarks = _sampler(settings, float(shift))
        chunk = settings.get("num_frame_per_block", int, 1)
        window, sink = kwargs.get("local_attn_size", int, -1), kwargs.get("sink_size", int, 0)
        defaults = replace(
            PRESETS["self-forcing-framewise" if chunk == 1 else "self-forcing"],
            chunk_frames=chunk,
            first_chunk_frames=1 if settings.get("independent_first_frame", bool, False) else None,
            context_timestep=float(settings.get("context_noise", (int, float), 0)),
            negative_prompt=settings.get("negative_prompt", str, PRESETS["self-forcing"].negative_prompt),
            sampler=sampler,
            memory=window_memory(window, sink),
            **_size(settings),
        )
    except ConfigError as error:
        raise error if str(error).startswith(str(path)) else ConfigError(f"{path}: {error}") from error
    if sink and window <= 0:
        remarks.append(f"{path}: model_kwargs.sink_size {sink} has no effect without local_attn_size")
    rank, alpha = adapter.get("rank", int, 0), adapter.get("alpha", (int, float), 0)
    ema = settings.get("use_ema", bool)
    if unused := [*settings.rest(), *kwargs.rest(), *adapter.rest()]:
        remarks.append(f"{path}: of training or of their program, not used here: {', '.join(map(str, unused))}")
    return InferenceSettings(
        defaults=defaults,
        part=None if ema is None else "generator_ema" if ema else "generator",
        lora_scale=alpha / rank if rank and alpha else None,
        remarks=remarks,
    )


def _sampler(settings: _Settings, shift: float) -> tuple[SamplerConfig, list[str]]:
    steps = settings.get("denoising_step_list", list)
    guidance = settings.get("guidance_scale", (int, float))
    if not steps:  # their multi-step pipeline
        scale = 1.0 if guidance is None else float(guidance)
        count = settings.get("sampling_steps", int, WAN_STEPS)
        return SamplerConfig(kind="wan_unipc", steps=count, shift=shift, guidance_scale=scale), []
    if not all(type(step) is int for step in steps):
        raise ConfigError(f"denoising_step_list: whole numbers are needed, got {steps!r:.60}")
    warp = settings.get("warp_denoising_step", bool, False)
    listed = tuple(steps[:-1] if steps[-1] == 0 else steps)  # a closing 0 is no step
    if not listed:
        raise ConfigError("denoising_step_list: holds no step")
    sampler = SamplerConfig(kind="few_step", steps=len(listed), shift=shift, step_list=listed, warp_steps=warp)
    remarks = (
        [f"{settings.path}: guidance_scale {guidance:g} is the teacher's; the few steps need none"] if guidance else []
    )
    return sampler, remarks


def _size(settings: _Settings) -> dict[str, Any]:
    """Pixels and pixel frames of the latent shape [videos, frames, channels, rows, columns] that a config names."""
    shape = settings.get("image_or_video_shape", list)
    frames = settings.get("num_output_frames", int)
    size: dict[str, int] = {}
    if shape is not None:
        if len(shape) != 5 or not all(type(number) is int and number > 0 for number in shape):
            raise ConfigError(f"image_or_video_shape: five whole numbers are needed, got {shape!r:.60}")
        frames = frames or shape[1]
        size = {"height": _STRIDES[1] * shape[3], "width": _STRIDES[1] * shape[4]}
    return size | ({"num_frames": _STRIDES[0] * (frames - 1) + 1} if frames else {})
