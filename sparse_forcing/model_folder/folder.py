"""A model folder: the defaults in it, its parts one by one, and writing one.

transformer/, text_encoder/ and vae/ are what diffusers saves; beside them lie pipeline.json with the defaults and a
manifest of hashes. A diffusers Wan folder has neither, and gets Wan's defaults.
"""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sparse_forcing.config import build_config
from sparse_forcing.devices import multiplies_bfloat16
from sparse_forcing.errors import WeightsError
from sparse_forcing.files import atomic_write_json, explain_full_disk, is_file, read_json
from sparse_forcing.model.text import TextEncoder, UMT5TextEncoder, WordTextEncoder
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model.vae import PatchAutoencoder, TokenAutoencoder, VideoAutoencoder, WanAutoencoder
from sparse_forcing.model_folder.adapters import add_kept_adapters
from sparse_forcing.model_folder.defaults import PipelineConfig
from sparse_forcing.model_folder.recognise import (
    PIPELINE_FILE,
    check_supported,
    recognise_defaults,
)
from sparse_forcing.model_folder.remarks import folder_remarks
from sparse_forcing.weights.hub import fetch_model, is_hub_id
from sparse_forcing.weights.manifest import write_manifest
from sparse_forcing.weights.parts import check_part, load_part
from sparse_forcing.weights.safe_load import MAX_CONFIG_BYTES, check_safetensors, not_finite

EMBEDDED_MODELS = Path(__file__).parents[1] / "models"
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_ORIGIN = ("_name_or_path", "name_or_path", "is_local", "local_files_only")
EMBEDDED_AUTOENCODERS: dict[str, type] = {"patch": PatchAutoencoder, "token": TokenAutoencoder}


def find_model(model: str, **hub_options: Any) -> Path:
    """Folder of an embedded model's name, of a path, or of a model of the hub (`hub_options`: see `fetch_model`).
    Raises WeightsError naming what is known."""
    for folder in (EMBEDDED_MODELS / model, Path(model)):
        if any(is_file(folder / name, WeightsError) for name in (PIPELINE_FILE, "transformer/config.json")):
            if folder.parent != EMBEDDED_MODELS:
                check_supported(folder)
            return folder
    if is_hub_id(model) and not Path(model).exists():
        folder = fetch_model(model, **hub_options)
        check_supported(folder)
        return folder
    known = sorted(path.parent.name for path in EMBEDDED_MODELS.glob(f"*/{PIPELINE_FILE}"))
    raise WeightsError(
        f"model {model!r}: not an embedded model ({', '.join(known)}), not a folder with {PIPELINE_FILE} "
        "or a diffusers transformer, and not an owner/name of the hub"
    )


def read_defaults(folder: Path) -> PipelineConfig:
    """The folder's defaults: its pipeline.json, or else what its scheduler and its transformer's config say."""
    path = folder / PIPELINE_FILE
    config = (
        build_config(PipelineConfig, read_json(path, max_bytes=MAX_CONFIG_BYTES), source=str(path))
        if path.is_file()
        else recognise_defaults(folder)
    )
    if config.vae not in (*EMBEDDED_AUTOENCODERS, "wan") or config.text_encoder not in ("words", "umt5"):
        raise WeightsError(f"{path}: unknown parts vae={config.vae!r}, text_encoder={config.text_encoder!r}")
    return config


def load_transformer(folder: Path, dtype: torch.dtype | None = None) -> CausalWanTransformer3DModel:
    """The transformer of a model folder, kept adapters added to its weights; warns of what the folder says and nothing
    here uses. Raises WeightsError."""
    model = load_part(CausalWanTransformer3DModel, folder / "transformer", dtype or torch.float32)
    finish_transformer(model, folder)
    return model


def finish_transformer(model: CausalWanTransformer3DModel, folder: Path) -> None:
    """What is left to do with a transformer that was read from a model folder: check its numbers, add kept adapters,
    warn of what nothing here uses. Raises WeightsError."""
    # Attention on a CPU makes zeros of queries that are NaN: no video would tell.
    if bad := not_finite(model.state_dict()):
        raise WeightsError(
            f"{folder / 'transformer'}: tensor {bad} holds NaN or infinite numbers; the weights cannot be used"
        )
    add_kept_adapters(model, folder)
    for remark in folder_remarks(folder):
        warnings.warn(remark, stacklevel=2)


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


def usual_dtype(folder: Path, device: str) -> torch.dtype:
    """What a model's weights are computed in unless somebody says otherwise: bfloat16 on a GPU, as they are stored on a
    CPU that multiplies bfloat16, float32 on one that does not (its products take hundreds of times as long); the
    embedded models in float32, in which they were trained. Raises WeightsError."""
    if not device.startswith("cpu") and read_defaults(folder).vae not in EMBEDDED_AUTOENCODERS:
        return torch.bfloat16
    stored = stored_dtype(folder)
    return stored if multiplies_bfloat16(torch.device(device)) else torch.float32


def stored_dtype(folder: Path) -> torch.dtype:
    """What most of a transformer's weights are stored in; float32 for the embedded models. Raises WeightsError."""
    if read_defaults(folder).vae in EMBEDDED_AUTOENCODERS:
        return torch.float32
    for path in sorted((folder / "transformer").glob("*.safetensors")):
        kinds = [dtype for dtype, _ in check_safetensors(path).values() if dtype in STORED]
        if kinds:
            return STORED[max(set(kinds), key=kinds.count)]
    return torch.float32


def write_pipeline(
    folder: Path, transformer: CausalWanTransformer3DModel, config: PipelineConfig, parts: list[Path]
) -> None:
    """Write a model folder from a transformer and the folders of the parts beside it, which are linked where the file
    system can (text encoders are large), copied elsewhere."""
    with explain_full_disk(folder / "transformer"):
        transformer.save_pretrained(folder / "transformer")
    for part in parts:
        link_part(part, folder / part.name)
    atomic_write_json(folder / PIPELINE_FILE, asdict(config))
    write_manifest(folder)


def write_autoencoder(folder: Path, vae: PatchAutoencoder | TokenAutoencoder, config: PipelineConfig) -> None:
    """Write a model folder that holds an autoencoder alone, for models that are still to be trained."""
    save_part(vae, folder / "vae")
    atomic_write_json(folder / PIPELINE_FILE, asdict(replace(config, vae=identify_autoencoder(vae))))
    write_manifest(folder)


def save_part(part: Any, folder: Path) -> None:
    """Write one embedded part of a model."""
    with explain_full_disk(folder):
        part.save_pretrained(folder)
    forget_origin(folder / "config.json")


def forget_origin(path: Path) -> None:
    """Take out of a config where its part came from: that is nobody's business, and would change hashes."""
    settings = read_json(path)
    atomic_write_json(path, {name: value for name, value in settings.items() if name not in _ORIGIN})


def identify_autoencoder(vae: VideoAutoencoder) -> str:
    """What a model folder calls an embedded autoencoder."""
    return next(name for name, kind in EMBEDDED_AUTOENCODERS.items() if isinstance(vae, kind))


def link_part(source: Path, target: Path) -> None:
    """Put a part of another model into this one: linked where the file system can, copied elsewhere."""
    shutil.copytree(source, target, copy_function=_link_or_copy, dirs_exist_ok=True)


def _link_or_copy(source: str, target: str) -> str:
    Path(target).unlink(missing_ok=True)
    source = os.path.realpath(source)  # download caches hold links, whose targets may be cleared away
    try:
        os.link(source, target)
    except OSError:
        try:  # copytree would collect system errors into one that says nothing
            with explain_full_disk(Path(target)):
                shutil.copy2(source, target)
        except OSError as error:
            raise WeightsError(f"cannot read {source}: {error.strerror or error}") from error
    return target
