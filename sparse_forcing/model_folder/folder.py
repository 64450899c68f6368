"""A model folder: the defaults in it, its parts one by one, and writing one.

transformer/, text_encoder/ and vae/ are what diffusers saves; beside them lie pipeline.json with the defaults and a
manifest of hashes. A diffusers Wan folder has neither, and gets Wan's defaults.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sparse_forcing.config import build_config
from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.files import atomic_write_json, is_file, read_json
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model.text import TextEncoder, UMT5TextEncoder, WordTextEncoder
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model.vae import PatchAutoencoder, TokenAutoencoder, VideoAutoencoder, WanAutoencoder
from sparse_forcing.model_folder.hub import fetch_model, is_hub_id
from sparse_forcing.weights.manifest import write_manifest
from sparse_forcing.weights.parts import check_part, load_part
from sparse_forcing.weights.safe_load import MAX_CONFIG_BYTES

EMBEDDED_MODELS = Path(__file__).parents[1] / "models"
PIPELINE_FILE = "pipeline.json"
MAX_FPS = 1000
_ORIGIN = ("_name_or_path", "name_or_path", "is_local", "local_files_only")
EMBEDDED_AUTOENCODERS: dict[str, type] = {"patch": PatchAutoencoder, "token": TokenAutoencoder}


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Defaults of a model: what `pipe(prompt)` does when nothing else is said.

    Args:
        fps: pixel frames per second the model was trained at.
        height, width, num_frames: pixels and pixel frames of a default video.
        text_encoder, vae: kinds of the parts beside the transformer.
    """

    fps: float = 16.0
    height: int = 480
    width: int = 832
    num_frames: int = 81
    negative_prompt: str = ""
    text_encoder: str = "umt5"
    vae: str = "wan"
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    def __post_init__(self) -> None:
        if not 0 < self.fps <= MAX_FPS:
            raise ConfigError(f"fps: above 0, at most {MAX_FPS}, got {self.fps}")
        if min(self.height, self.width, self.num_frames) < 1:
            raise ConfigError(
                f"height, width and num_frames: at least 1, got {self.height}, {self.width} and {self.num_frames}"
            )


def find_model(model: str, **hub_options: Any) -> Path:
    """Folder of an embedded model's name, of a path, or of a model of the hub (`hub_options`: see `fetch_model`).
    Raises WeightsError naming what is known."""
    for folder in (EMBEDDED_MODELS / model, Path(model)):
        if any(is_file(folder / name, WeightsError) for name in (PIPELINE_FILE, "transformer/config.json")):
            return folder
    if is_hub_id(model) and not Path(model).exists():
        return fetch_model(model, **hub_options)
    known = sorted(path.parent.name for path in EMBEDDED_MODELS.glob(f"*/{PIPELINE_FILE}"))
    raise WeightsError(
        f"model {model!r}: not an embedded model ({', '.join(known)}), not a folder with {PIPELINE_FILE} "
        "or a diffusers transformer, and not an owner/name of the hub"
    )


def read_defaults(folder: Path) -> PipelineConfig:
    """The folder's defaults; a diffusers folder has none and gets Wan's."""
    path = folder / PIPELINE_FILE
    config = (
        build_config(PipelineConfig, read_json(path, max_bytes=MAX_CONFIG_BYTES), source=str(path))
        if path.is_file()
        else PipelineConfig()
    )
    if config.vae not in (*EMBEDDED_AUTOENCODERS, "wan") or config.text_encoder not in ("words", "umt5"):
        raise WeightsError(f"{path}: unknown parts vae={config.vae!r}, text_encoder={config.text_encoder!r}")
    return config


def load_transformer(folder: Path, dtype: torch.dtype | None = None) -> CausalWanTransformer3DModel:
    """The transformer of a model folder. Raises WeightsError."""
    return load_part(CausalWanTransformer3DModel, folder / "transformer", dtype or torch.float32)


def load_text_encoder(folder: Path, dtype: torch.dtype | None = None) -> TextEncoder:
    """The text encoder of a model folder. Raises WeightsError."""
    if read_defaults(folder).text_encoder == "words":
        return load_part(WordTextEncoder, folder / "text_encoder", dtype or torch.float32)
    check_part(folder / "text_encoder")
    return UMT5TextEncoder.from_pretrained(folder, torch_dtype=dtype)


def load_autoencoder(folder: Path, dtype: torch.dtype | None = None) -> VideoAutoencoder:
    """The autoencoder of a model folder. Raises WeightsError."""
    kind = read_defaults(folder).vae
    if kind in EMBEDDED_AUTOENCODERS:
        return load_part(EMBEDDED_AUTOENCODERS[kind], folder / "vae", torch.float32)
    return WanAutoencoder.from_pretrained(folder / "vae", torch_dtype=dtype)


def write_pipeline(
    folder: Path, transformer: CausalWanTransformer3DModel, config: PipelineConfig, parts: list[Path]
) -> None:
    """Write a model folder from a transformer and the folders of the parts beside it, which are linked where the file
    system can (text encoders are large), copied elsewhere."""
    transformer.save_pretrained(folder / "transformer")
    for part in parts:
        shutil.copytree(part, folder / part.name, copy_function=_link_or_copy, dirs_exist_ok=True)
    atomic_write_json(folder / PIPELINE_FILE, asdict(config))
    write_manifest(folder)


def write_autoencoder(folder: Path, vae: PatchAutoencoder | TokenAutoencoder, config: PipelineConfig) -> None:
    """Write a model folder that holds an autoencoder alone, for models that are still to be trained."""
    save_part(vae, folder / "vae")
    atomic_write_json(folder / PIPELINE_FILE, asdict(replace(config, vae=kind_of(vae))))
    write_manifest(folder)


def save_part(part: Any, folder: Path) -> None:
    """Write one embedded part of a model."""
    part.save_pretrained(folder)
    forget_origin(folder / "config.json")


def forget_origin(path: Path) -> None:
    """Take out of a config where its part came from: that is nobody's business, and would change hashes."""
    settings = read_json(path)
    atomic_write_json(path, {name: value for name, value in settings.items() if name not in _ORIGIN})


def kind_of(vae: VideoAutoencoder) -> str:
    """What a model folder calls an embedded autoencoder."""
    return next(name for name, kind in EMBEDDED_AUTOENCODERS.items() if isinstance(vae, kind))


def _link_or_copy(source: str, target: str) -> str:
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
