"""Checkpoints that others published -> a model folder that generates at once, checked bit by bit once it is written.

A source is a weight file, a folder of shards, the folder of an original Wan, or a model folder. What it lacks (text
encoder, tokenizer, autoencoder) comes from `base`, in diffusers' layout or Wan's own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparse_forcing.config import constructor_settings
from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.files import TEMPORARY_PREFIX, PathLike, atomic_write_json, explain_full_disk
from sparse_forcing.model_folder.adapters import Adapter, merge, read_adapters, write_adapters
from sparse_forcing.model_folder.defaults import PipelineConfig
from sparse_forcing.model_folder.folder import link_part, read_defaults
from sparse_forcing.model_folder.keys import (
    HEAD_DIM,
    SELF_FORCING_PARTS,
    choose_part,
    list_parts,
    select_state,
    to_diffusers,
)
from sparse_forcing.model_folder.originals import (
    BUILDERS,
    build_part,
    build_transformer,
    find_part,
    read_states,
    weight_files,
)
from sparse_forcing.model_folder.presets import PRESETS, preset, wan_size
from sparse_forcing.model_folder.recognise import CAUSAL, PIPELINE_FILE, PLAIN, TRANSFORMER, check_supported, read_table
from sparse_forcing.model_folder.self_forcing_config import InferenceSettings, read_inference_settings
from sparse_forcing.model_folder.written import check_written
from sparse_forcing.weights.safe_load import load_weights

PARTS = ("transformer", "text_encoder", "tokenizer", "vae")
_ORIGINAL = {"text_encoder": "models_t5*.pth", "vae": "*VAE*.pth"}
_TOKENIZER = "google/umt5-xxl"  # where it lies in the folder of an original Wan


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """How a checkpoint is converted.

    which: part of the checkpoint; head_dim: None to take it from a config, or else Wan's; base: model folder that
    fills in what the source lacks; preset, config: how the model samples, by name or by Self-Forcing's YAML; lora: an
    adapter file, merged unless `keep_lora`.
    """

    which: str | None = None
    head_dim: int | None = None
    base: Path | None = None
    preset: str | None = None
    config: Path | None = None
    lora: Path | None = None
    lora_scale: float | None = None
    keep_lora: bool = False

    def __post_init__(self) -> None:
        if self.preset is not None and self.config is not None:
            raise ConfigError("give --preset or --config, not both: each says how the model samples")
        if self.lora is None and (self.keep_lora or self.lora_scale is not None):
            raise ConfigError("--keep-lora and --lora-scale have no effect without --lora")
        if self.preset is not None:
            preset(self.preset)


@dataclass
class Converted:
    """What a conversion did.

    tensors: how many were compared; preset: how the model samples, None without a transformer; remarks: what of the
    source is not used, and what is still missing.
    """

    tensors: int = 0
    preset: str | None = None
    remarks: list[str] = field(default_factory=list)


@dataclass
class _Plan:
    """What will be written: parts made here, parts of other folders to link, adapters to keep, defaults."""

    built: dict[str, Any] = field(default_factory=dict)
    linked: dict[str, Path] = field(default_factory=dict)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    defaults: PipelineConfig | None = None
    remarks: list[str] = field(default_factory=list)


def convert(source: Path, target: Path, options: ConvertOptions) -> Converted:
    """Write `target`, a model folder, from a checkpoint. Everything is checked before anything is written, and written
    under a temporary name first: a failure leaves nothing behind. The manifest is the caller's to write.

    Raises:
        WeightsError: damaged, hostile or foreign files, tensors or parts that do not fit, the first few named.
        ConfigError: settings that contradict each other or the file.
    """
    yaml = read_inference_settings(options.config) if options.config is not None else None
    plan = _Plan(remarks=list(yaml.remarks) if yaml else [])
    if (base := options.base) is not None:
        _check_base(base)
    if (source / TRANSFORMER).is_file():
        check_supported(source)
        base, weights = base or source, source / "transformer"
    else:
        weights = source
        if source.is_dir() and _is_original(source):
            base = base or source
    _read_source(source, weights, options, yaml, plan)
    if base is not None:
        _fill_in(base, plan)
    _check_parts_fit(target, plan)
    missing = [name for name in PARTS if name not in plan.built and name not in plan.linked]
    if missing:
        plan.remarks.append(f"{target}: still lacks {', '.join(missing)}; --base FOLDER fills in what a folder has")
    return _write(target, plan)


def _read_source(
    source: Path, weights: Path, options: ConvertOptions, yaml: InferenceSettings | None, plan: _Plan
) -> None:
    """Build what the source's own files hold."""
    if weights.is_dir() and (weights / "high_noise_model").is_dir():
        raise WeightsError(f"{source}: this is Wan 2.2 A14B, which has two experts; only Wan 2.1 runs here")
    contents = {path: load_weights(path) for path in weight_files(weights)}
    first = next(iter(contents.values()))
    which = options.which or _yaml_part(yaml, first)
    state = read_states(source, contents, which)
    if (name := find_part(state)) in BUILDERS:
        if options.lora or options.preset or options.config:
            raise ConfigError(f"{source}: holds a {name} alone; --lora, --preset and --config are for transformers")
        plan.built[name] = BUILDERS[name](state, source)
        return
    config = _config_beside(weights)
    if config.get("model_type", "t2v") != "t2v":
        raise WeightsError(f"{source}: this is Wan for {config['model_type']!s:.20}; only text-to-video Wan runs here")
    plan.remarks += _list_left_out(source, first, which)
    plan.defaults = _defaults(source, weights, options, yaml, first, state, config)
    if options.lora is not None:
        state = to_diffusers(state, source=str(source))
        scale = options.lora_scale or (yaml.lora_scale if yaml else None) or 1.0
        adapters, remarks = read_adapters(options.lora, scale)
        plan.remarks += remarks if scale == 1.0 else []
        merged = merge(state, adapters, options.lora)
        state, plan.adapters = (state, adapters) if options.keep_lora else (merged, {})
    settings = None if options.head_dim else _settings(config, plan)
    head_dim = options.head_dim or _head_dim(config) or _head_dim(_base_config(options.base)) or HEAD_DIM
    model = build_transformer(state, source, head_dim=head_dim, config=settings)
    if plan.defaults.chunk_frames:
        model.register_to_config(chunk_frames=plan.defaults.chunk_frames)
    plan.built["transformer"] = model


def _yaml_part(yaml: InferenceSettings | None, content: Any) -> str | None:
    return yaml.part if yaml is not None and yaml.part in list_parts(content) else None


def _list_left_out(source: Path, content: Any, which: str | None) -> list[str]:
    """What a checkpoint holds beside the state dict that is taken."""
    chosen = choose_part(content, which)
    others = [str(name) for name in content if str(name) != chosen] if chosen is not None else []
    return [f"{source}: {chosen} is taken, left out are {', '.join(others)} (see --part)"] if others else []


def _defaults(
    source: Path,
    weights: Path,
    options: ConvertOptions,
    yaml: InferenceSettings | None,
    content: Any,
    state: Mapping[str, Any],
    config: Mapping[str, Any],
) -> PipelineConfig:
    """How the model samples: as asked for, as its folder says, or as its family does by the names in the file."""
    if yaml is not None:
        return yaml.defaults
    if options.preset is not None:
        return preset(options.preset)
    if weights != source:
        return read_defaults(source)
    layers = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    keys = select_state(content, options.which).keys()
    wrapped = choose_part(content, options.which) in SELF_FORCING_PARTS
    wrapped = wrapped or any(key.startswith("model.") and not key.startswith("model.diffusion_model.") for key in keys)
    if options.lora is not None and wrapped:
        return PRESETS["longlive"]
    if wrapped or config.get("_class_name") in (CAUSAL, "CausalWanModel"):
        return PRESETS["self-forcing"]
    return PRESETS[wan_size(layers)]


def _config_beside(weights: Path) -> dict[str, Any]:
    """config.json in the folder of some weights, if it is one of a Wan transformer."""
    config = read_table((weights if weights.is_dir() else weights.parent) / "config.json")
    return config if config.get("_class_name") in (PLAIN, CAUSAL, "WanModel", "CausalWanModel") else {}


def _base_config(base: Path | None) -> dict[str, Any]:
    return {} if base is None else _config_beside(base / "transformer") or _config_beside(base)


def _settings(config: Mapping[str, Any], plan: _Plan) -> dict[str, Any] | None:
    """Constructor settings of a transformer from diffusers' config; None where there is none and shapes must tell."""
    if config.get("_class_name") not in (PLAIN, CAUSAL):
        return None
    from sparse_forcing.model.transformer import CausalWanTransformer3DModel

    with_known = CausalWanTransformer3DModel.extract_init_dict(dict(config))[0]
    settings = {name: value for name, value in constructor_settings(config).items() if name in with_known}
    if unused := sorted(constructor_settings(config).keys() - settings.keys()):
        plan.remarks.append(f"config.json: not used: {', '.join(unused)}")
    return settings


def _head_dim(config: Mapping[str, Any]) -> int | None:
    if config.get("attention_head_dim"):
        return int(config["attention_head_dim"])
    if config.get("dim") and config.get("num_heads"):
        return int(config["dim"]) // int(config["num_heads"])
    return None


def _is_original(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in _ORIGINAL.values())


def _offers(base: Path) -> dict[str, Path]:
    """What a folder has of a model, by part: folders to link (diffusers' layout) or files to convert (Wan's own)."""
    offers = {name: base / name for name in PARTS if (base / name).is_dir()}
    if _is_original(base):
        for name, pattern in _ORIGINAL.items():
            if name not in offers and (path := next(base.glob(pattern), None)) is not None:
                offers[name] = path
        if "tokenizer" not in offers and (base / _TOKENIZER).is_dir():
            offers["tokenizer"] = base / _TOKENIZER
    return offers


def _check_base(base: Path) -> None:
    """Raise WeightsError when a folder cannot fill in what a transformer lacks."""
    if not base.is_dir():
        raise WeightsError(f"{base}: no such model folder to take text encoder, tokenizer and autoencoder from")
    if lacking := [name for name in PARTS[1:] if name not in _offers(base)]:
        raise WeightsError(f"{base}: has no {' and no '.join(lacking)} to take; give the folder of a complete Wan 2.1")
    if (base / TRANSFORMER).is_file() and read_defaults(base).vae != "wan":
        raise WeightsError(f"{base}: its autoencoder is not Wan's; give the folder of a complete Wan 2.1")


def _fill_in(base: Path, plan: _Plan) -> None:
    """Take what is missing from another folder."""
    for name, path in _offers(base).items():
        if name in plan.built:
            continue
        if path.is_dir():
            plan.linked[name] = path
            continue
        found, plan.built[name] = build_part(path)
        if found != name:
            raise WeightsError(f"{path}: holds a {found}, not a {name}")
    if "transformer" in plan.linked:
        plan.defaults = read_defaults(base)


def _check_parts_fit(target: Path, plan: _Plan) -> None:
    """Raise WeightsError when numbers that parts must share differ."""

    def number(part: str, name: str) -> Any:
        if part in plan.built:
            return getattr(plan.built[part].config, name)
        return read_table(plan.linked[part] / "config.json").get(name) if part in plan.linked else None

    for (one, name), (two, other) in (
        (("transformer", "text_dim"), ("text_encoder", "d_model")),
        (("transformer", "in_channels"), ("vae", "z_dim")),
    ):
        left, right = number(one, name), number(two, other)
        if left is not None and right is not None and left != right:
            raise WeightsError(f"{target}: parts do not fit together: {one} has {name} {left}, {two} {other} {right}")


def _write(target: Path, plan: _Plan) -> Converted:
    done = Converted(remarks=plan.remarks)
    temporary = target / f"{TEMPORARY_PREFIX}{os.getpid()}-convert"
    try:
        for name, module in plan.built.items():
            with explain_full_disk(target / name):
                module.save_pretrained(temporary / name)
            done.tensors += check_written(temporary / name, module.state_dict())
        for name, folder in plan.linked.items():
            link_part(folder, temporary / name)
        if plan.adapters:
            write_adapters(temporary, plan.adapters)
        if plan.defaults is not None:
            done.preset = plan.defaults.preset
            atomic_write_json(temporary / PIPELINE_FILE, asdict(plan.defaults))
        for path in sorted(temporary.iterdir()):
            path.rename(target / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return done


def load_transformer(source: PathLike, which: str | None = None, *, head_dim: int = HEAD_DIM) -> Any:
    """A CausalWanTransformer3DModel with the weights of a checkpoint (file, or folder of shards). Raises WeightsError.

    Args:
        which: part of the checkpoint (`generator_ema`, `generator`, `critic`); chosen as in `select_state` when None.
        head_dim: numbers in an attention head, which weights do not tell (128 in every released Wan).
    """
    contents = {path: load_weights(path) for path in weight_files(Path(source))}
    return build_transformer(read_states(Path(source), contents, which), source, head_dim=head_dim)
