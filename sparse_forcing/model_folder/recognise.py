"""What a model folder without pipeline.json says about itself: which model it is, how it samples, what is not used.

Read from `model_index.json`, `scheduler/scheduler_config.json` and the configs of the parts. Everything a folder says
is used here, refused by the name of the model it belongs to, or remarked on.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.files import read_json
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model_folder.defaults import PipelineConfig
from sparse_forcing.model_folder.presets import PRESETS, WAN_STEPS, wan_size
from sparse_forcing.weights.safe_load import MAX_CONFIG_BYTES

PIPELINE_FILE = "pipeline.json"
TRANSFORMER = Path("transformer/config.json")
SCHEDULER = Path("scheduler/scheduler_config.json")
INDEX = Path("model_index.json")
PLAIN, CAUSAL = "WanTransformer3DModel", "CausalWanTransformer3DModel"
_PARTS = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler", "adapter")
_DIFFUSERS_GUIDANCE = 5.0  # of diffusers' WanPipeline, which no file of a folder holds
_SCHEDULERS = {"UniPCMultistepScheduler": "flow_shift", "FlowMatchEulerDiscreteScheduler": "shift"}
_UNIPC = {
    "use_flow_sigmas": True, "prediction_type": "flow_prediction", "num_train_timesteps": 1000, "solver_order": 2,
    "solver_type": "bh2", "predict_x0": True, "lower_order_final": True, "thresholding": False,
    "final_sigmas_type": "zero", "disable_corrector": [], "solver_p": None, "use_dynamic_shifting": False,
    "use_beta_sigmas": False, "use_exponential_sigmas": False, "use_karras_sigmas": False,
    "rescale_betas_zero_snr": False,
}  # fmt: skip
"""Settings of UniPC that this project samples with; other values change the video."""
_WINDOW = ("local_attn_size", "sink_size")
_CHUNK = ("num_frame_per_block", "num_frames_per_block")


def check_supported(folder: Path) -> None:
    """Refuse, by name, folders of models that share Wan's layout and are others. Raises WeightsError."""
    index, config = read_table(folder / INDEX), read_table(folder / TRANSFORMER)
    vae = read_table(folder / "vae/config.json")
    experts = (folder / "transformer_2").is_dir() or _is_part(index.get("transformer_2"))
    if experts or index.get("boundary_ratio") is not None:
        _refuse(folder, "Wan 2.2 A14B, which has two experts")
    if name := name_unsupported(config):
        _refuse(folder, name)
    if vae.get("patch_size") is not None or vae.get("z_dim") == 48:
        _refuse(folder, "of Wan 2.2's autoencoder (48 latent channels)")
    if (folder / "image_encoder").is_dir() or _is_part(index.get("image_encoder")):
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


def _is_part(entry: Any) -> bool:
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
    if kind not in _SCHEDULERS:
        return base
    shift = float(scheduler.get(_SCHEDULERS[kind], 1.0))
    sampler = SamplerConfig(
        kind="unipc" if kind == "UniPCMultistepScheduler" else "euler",
        steps=WAN_STEPS,
        shift=shift,
        guidance_scale=_DIFFUSERS_GUIDANCE,
    )
    return replace(base, sampler=sampler)


def _causal(folder: Path, config: Mapping[str, Any]) -> PipelineConfig:
    if config.get("selector_tokens"):
        return replace(PRESETS["sparse-forcing"], chunk_frames=None)
    window, sink = (int(config.get(name) or 0) for name in _WINDOW)
    chunk = next((int(config[name]) for name in _CHUNK if config.get(name)), None)
    base = replace(PRESETS["self-forcing-framewise" if chunk == 1 else "self-forcing"], chunk_frames=chunk)
    scheduler = read_table(folder / SCHEDULER)
    if scheduler.get("_class_name") == "SelfForcingFlowMatchScheduler" and scheduler.get("shift"):
        base = replace(base, sampler=replace(base.sampler, shift=float(scheduler["shift"])))
    return replace(base, memory=window_memory(window, sink))


def window_memory(window: int, sink: int) -> MemoryConfig:
    """Self-Forcing's `local_attn_size` (-1 or 0 for none) and LongLive's `sink_size`, in latent frames."""
    if window <= 0:
        return PRESETS["self-forcing"].memory
    memory = MemoryConfig(kind="window", window_frames=window, positions="absolute")
    return replace(memory, kind="sink", sink_frames=sink) if sink else memory


def folder_remarks(folder: Path) -> list[str]:
    """What a folder says that nothing here uses, a line each; nothing where pipeline.json says how it samples."""
    return list(_remarks(folder))


def _remarks(folder: Path) -> Iterator[str]:
    config = read_table(folder / TRANSFORMER)
    known = {*inspect.signature(CausalWanTransformer3DModel.__init__).parameters, *_WINDOW, *_CHUNK}
    if strange := [name for name in config if name not in known and not name.startswith("_")]:
        yield f"{folder / TRANSFORMER}: not used: {', '.join(sorted(strange))}"
    if others := sorted(
        path.name
        for path in folder.iterdir()
        if path.is_dir() and path.name not in _PARTS and not path.name.startswith((".", "_"))
    ):
        yield f"{folder}: parts that are not used: {', '.join(others)}"
    if (folder / PIPELINE_FILE).is_file():
        return
    scheduler = read_table(folder / SCHEDULER)
    kind = scheduler.get("_class_name")
    if config.get("_class_name") == PLAIN and kind is not None and kind not in _SCHEDULERS:
        yield f"{folder / SCHEDULER}: {kind!s:.60} is not known; UniPC is used in its place (see --sampler, --shift)"
    if config.get("_class_name") != PLAIN and kind in _SCHEDULERS:
        yield f"{folder / SCHEDULER}: not used, causal weights are sampled in a few steps (see --sampler)"
    elif kind == "UniPCMultistepScheduler":
        other = [name for name, value in _UNIPC.items() if scheduler.get(name, value) != value]
        if other:
            yield f"{folder / SCHEDULER}: not used: {', '.join(f'{name}={scheduler[name]!s:.40}' for name in other)}"


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
