"""Presets: how weights that others published are meant to be sampled, by the name people know them by."""

from __future__ import annotations

from dataclasses import replace

from sparse_forcing.errors import ConfigError
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model_folder.defaults import PipelineConfig

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)
"""What Wan 2.1 was tuned to be led away from, in its makers' words; the models that descend from it use the same."""

WAN_STEPS = 50
_FULL = MemoryConfig(kind="full", positions="absolute")
_FOUR_STEPS = SamplerConfig(kind="few_step", steps=4, shift=5.0, step_list=(1000, 750, 500, 250))


def _preset(**settings: object) -> PipelineConfig:
    return PipelineConfig(negative_prompt=NEGATIVE_PROMPT, **settings)  # type: ignore[arg-type]


def _wan(shift: float, guidance_scale: float) -> PipelineConfig:
    sampler = SamplerConfig(kind="wan_unipc", steps=WAN_STEPS, shift=shift, guidance_scale=guidance_scale)
    return _preset(bidirectional=True, sampler=sampler, memory=_FULL)


_PRESETS = {
    "wan-1.3b": _wan(shift=8.0, guidance_scale=6.0),
    "wan-14b": _wan(shift=5.0, guidance_scale=5.0),
    "self-forcing": _preset(chunk_frames=3, sampler=_FOUR_STEPS, memory=_FULL),
    "self-forcing-framewise": _preset(chunk_frames=1, sampler=_FOUR_STEPS, memory=_FULL),
    "causvid": _preset(
        chunk_frames=3,
        sampler=SamplerConfig(kind="few_step", steps=3, shift=8.0, step_list=(1000, 757, 522), warp_steps=False),
        memory=_FULL,
    ),
    "longlive": _preset(
        chunk_frames=3,
        sampler=_FOUR_STEPS,
        memory=MemoryConfig(kind="sink", window_frames=12, sink_frames=3, positions="absolute"),
    ),
    "sparse-forcing": _preset(chunk_frames=3, sampler=_FOUR_STEPS, memory=MemoryConfig()),
}
PRESETS = {name: replace(config, preset=name) for name, config in _PRESETS.items()}
"""wan-1.3b, wan-14b: as Wan's own program and README have it. self-forcing: configs/self_forcing_dmd.yaml; framewise:
the same in chunks of one latent frame. causvid: timesteps that no shift applies to. longlive: a window of 12 latent
frames, the video's first 3 among them. sparse-forcing: Self-Forcing's sampler with this project's memory."""


def preset(name: str) -> PipelineConfig:
    """A preset by name. Raises ConfigError listing the known ones."""
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r:.60}: unknown; known are {', '.join(PRESETS)}")
    return PRESETS[name]


def wan_size(num_layers: int) -> str:
    """The preset of plain Wan weights with so many layers."""
    return "wan-14b" if num_layers >= 40 else "wan-1.3b"
