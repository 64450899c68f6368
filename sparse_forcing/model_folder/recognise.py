"""What a model folder without pipeline.json says about itself: which model it is and how it samples.

Read from `model_index.json`, `scheduler/scheduler_config.json` and the configs of the parts. Everything a folder says
is used here, refused by the name of the model it belongs to, or remarked on (remarks.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.files import read_json
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model_folder.defaults import PipelineConfig
from sparse_forcing.model_folder.presets import PRESETS, WAN_STEPS, wan_size
from sparse_forcing.weights.safe_load import MAX_CONFIG_BYTES

PIPELINE_FILE = "pipeline.json"
TRANSFORMER = Path("transformer/config.json")
SCHEDULER = Path("scheduler/scheduler_config.json")
INDEX = Path("model_index.json")
PLAIN, CAUSAL = "WanTransformer3DModel", "CausalWanTransformer3DModel"
_DIFFUSERS_GUIDANCE = 5.0  # of diffusers' WanPipeline, which no file of a folder holds
SCHEDULERS = {"UniPCMultistepScheduler": "flow_shift", "FlowMatchEulerDiscreteScheduler": "shift"}
"""diffusers' schedulers that plain Wan is sampled by here, and what each calls its shift."""
SELF_FORCING_SCHEDULER = "SelfForcingFlowMatchScheduler"
WINDOW = ("local_attn_size", "sink_size")
SELECTOR = "selector_tokens"
CHUNK = ("num_frame_per_block", "num_frames_per_block")


def check_supported(folder: Path) -> None:
    """Refuse, by name, folders of models that share Wan's layout and are others. Raises WeightsError."""
    index, config = read_table(folder / INDEX), read_table(folder / TRANSFORMER)
    vae = read_table(folder / "vae/config.json")
    experts = (folder / "transformer_2").is_dir() or is_part(index.get("transformer_2"))
    if experts or index.get("boundary_ratio") is not None:
        _refuse(folder, "Wan 2.2 A14B, which has two experts")
    if name := name_unsupported(config):
        _refuse(folder, name)
    if vae.get("patch_size") is not None or vae.get("z_dim") == 48:
        _refuse(folder, "of Wan 2.2's autoencoder (48 latent channels)")
    if (folder / "image_encoder").is_dir() or is_part(index.get("image_encoder")):
        _refuse(folder, "an image-to-video Wan (it has an image encoder)")


def name_unsupported(config: Mapping[str, Any]) -> str | None:
    """The name of a transformer, by its config in diffusers' words, that cannot be run here; None for one that can."""
    if config.get("in_channels") == 48:
        return "Wan 2.2 TI2V-5B (48 latent channels)"
    if config.get("image_dim") or config.get("added_kv_proj_dim") or config.get("in_channels") == 36:
        return "an image-to-video Wan (36 input channels, image encoder)"
    if config.get("pos_embed_seq_len"):
        return "Wan 2.1 FLF2V (first and last frame to video)"
    known = config.get("_class_name", CAUSAL)
    return None if known in (PLAIN, CAUSAL) else f"of the class {known!s:.60}"


def _refuse(folder: Path, name: str) -> None:
    raise WeightsError(f"{folder}: this is {name}; only text-to-video Wan 2.1 and its causal descendants run here")


def is_part(entry: Any) -> bool:
    """Whether an entry of `model_index.json` names a part, and not [null, null]."""
    return isinstance(entry, list) and any(entry)


def recognise_defaults(folder: Path) -> PipelineConfig:
    """How the model of a folder without pipeline.json samples. Raises WeightsError for settings that make no sense."""
    config = read_table(folder / TRANSFORMER)
    if not config:
        return PipelineConfig()
    try:
        if config.get("_class_name") == PLAIN:
            return _plain(folder, config)
        return _causal(folder, config)
    except (ConfigError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder}: its configs cannot be used: {error}") from error


def _plain(folder: Path, config: Mapping[str, Any]) -> PipelineConfig:
    """Wan as diffusers runs it: on the grid of diffusers, at the shift that the scheduler's config has."""
    base = PRESETS[wan_size(int(config.get("num_layers", 0)))]
    scheduler = read_table(folder / SCHEDULER)
    kind = scheduler.get("_class_name")
    if kind not in SCHEDULERS:
        return base
    shift = float(scheduler.get(SCHEDULERS[kind], 1.0))
    sampler = SamplerConfig(
        kind="unipc" if kind == "UniPCMultistepScheduler" else "diffusers_euler",
        steps=WAN_STEPS,
        shift=shift,
        guidance_scale=_DIFFUSERS_GUIDANCE,
    )
    return replace(base, sampler=sampler)


def _causal(folder: Path, config: Mapping[str, Any]) -> PipelineConfig:
    if config.get(SELECTOR):
        return replace(PRESETS["sparse-forcing"], chunk_frames=None)
    window, sink = (int(config.get(name) or 0) for name in WINDOW)
    chunk = next((int(config[name]) for name in CHUNK if config.get(name)), None)
    base = replace(PRESETS["self-forcing-framewise" if chunk == 1 else "self-forcing"], chunk_frames=chunk)
    scheduler = read_table(folder / SCHEDULER)
    if scheduler.get("_class_name") == SELF_FORCING_SCHEDULER and scheduler.get("shift"):
        base = replace(base, sampler=replace(base.sampler, shift=float(scheduler["shift"])))
    return replace(base, memory=window_memory(window, sink))


def window_memory(window: int, sink: int) -> MemoryConfig:
    """Self-Forcing's `local_attn_size` (-1 or 0 for none) and LongLive's `sink_size`, in latent frames."""
    if window <= 0:
        return PRESETS["self-forcing"].memory
    memory = MemoryConfig(kind="window", window_frames=window, positions="absolute")
    return replace(memory, kind="sink", sink_frames=sink) if sink else memory


def read_table(path: Path) -> dict[str, Any]:
    """A JSON file as a table; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        content = read_json(path, max_bytes=MAX_CONFIG_BYTES)
    except ConfigError as error:
        raise WeightsError(f"{error}; the config is damaged") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: not a table of settings; the config is damaged")
    return content
