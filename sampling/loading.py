"""What diffusers loads the parts of a model folder as, and what must hold of their files before it does.

Classes come from the kinds in the folder's defaults, never from a file that names them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin

from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.files import is_file, read_json
from sparse_forcing.model.text import WordTextEncoder, load_tokenizer
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model.word_tokenizer import WordTokenizer
from sparse_forcing.model_folder.folder import EMBEDDED_AUTOENCODERS, read_defaults, stored_dtype
from sparse_forcing.weights.parts import (
    check_model,
    check_part,
    explain_read_errors,
    require_part,
    warn_of_unused_tensors,
)
from sparse_forcing.weights.safe_load import MAX_CONFIG_BYTES

PIPELINE = "SparseForcingPipeline"
NOTHING = (None, None)


def component_index(folder: Path) -> dict[str, Any]:
    """The pipeline's config as diffusers reads it: {part: [module, class]}, [None, None] for what is passed to it."""
    defaults = read_defaults(folder)
    words, embedded = defaults.text_encoder == "words", EMBEDDED_AUTOENCODERS.get(defaults.vae)
    return {
        "_class_name": PIPELINE,
        "transformer": _name(CausalWanTransformer3DModel),
        "text_encoder": _name(WordTextEncoder) if words else ("transformers", "UMT5EncoderModel"),
        "tokenizer": NOTHING,
        "vae": _name(embedded) if embedded else ("diffusers", "AutoencoderKLWan"),
        "scheduler": _scheduler(folder),
    }


def _name(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__name__


def _scheduler(folder: Path) -> tuple[str | None, str | None]:
    """The scheduler that a pipeline of this project was saved with. Another pipeline's says nothing of how a model is
    sampled chunk by chunk."""
    path = folder / "model_index.json"
    if not is_file(path, WeightsError):
        return NOTHING
    with explain_read_errors(path):
        index = read_json(path, max_bytes=MAX_CONFIG_BYTES)
        _, name = index.get("scheduler") or NOTHING
        if index.get("_class_name") != PIPELINE or name is None:
            return NOTHING
        kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise WeightsError(f"{path}: scheduler {name!r:.60} is none of diffusers' schedulers")
    return "diffusers", kind.__name__


def left_out(folder: Path) -> set[str]:
    """What a pipeline of this project was saved without: it was given embeddings."""
    path = folder / "model_index.json"
    if not is_file(path, WeightsError):
        return set()
    with explain_read_errors(path):
        index = read_json(path, max_bytes=MAX_CONFIG_BYTES)
        lacks = index.get("_class_name") == PIPELINE and index.get("text_encoder") in (list(NOTHING), NOTHING)
    return {"text_encoder", "tokenizer"} if lacks and not (folder / "text_encoder").exists() else set()


def component_dtypes(
    folder: Path, dtype: torch.dtype | Mapping[str, torch.dtype | None] | None
) -> dict[str, torch.dtype | None]:
    """The type of each part's weights: by default as they are stored, and what is embedded in float32. An embedded
    autoencoder is not rounded unless it is asked for by name."""
    defaults, chosen = read_defaults(folder), dtype if isinstance(dtype, Mapping) else {}
    if unknown := set(chosen) - {"default", "transformer", "text_encoder", "vae"}:
        raise ConfigError(
            f"torch_dtype: {min(map(str, unknown))!r:.60} is none of transformer, text_encoder, vae, default"
        )
    common = chosen.get("default") if isinstance(dtype, Mapping) else dtype
    types = {
        "transformer": common or stored_dtype(folder),
        "text_encoder": common or (torch.float32 if defaults.text_encoder == "words" else None),
        "vae": torch.float32 if defaults.vae in EMBEDDED_AUTOENCODERS else common,
    }
    return {**types, **{name: chosen[name] for name in types if name in chosen}}


def check_components(folder: Path, given: Collection[str] = ()) -> None:
    """Raise WeightsError unless the files of all parts but the `given` ones are sound and hold exactly what a model of
    their config has."""
    defaults = read_defaults(folder)
    kinds: dict[str, type | None] = {
        "transformer": CausalWanTransformer3DModel,
        "text_encoder": WordTextEncoder if defaults.text_encoder == "words" else None,
        "vae": EMBEDDED_AUTOENCODERS.get(defaults.vae, diffusers.AutoencoderKLWan),
    }
    for name, kind in kinds.items():
        if name in given:
            continue
        part = folder / name
        require_part(part)
        if not any(part.glob("*.safetensors")):
            raise WeightsError(f"{part}: cannot be loaded (no .safetensors file; pickled weights are not read)")
        if kind is not None:
            check_model(kind, part)
        else:
            _check_umt5(part)


def _check_umt5(folder: Path) -> None:
    """Raise WeightsError for weights that transformers would make up; warn of those that it would leave out."""
    from transformers import UMT5Config, UMT5EncoderModel

    found = check_part(folder)
    with explain_read_errors(folder, "no readable umT5 encoder"):
        config = UMT5Config.from_pretrained(folder, local_files_only=True)
        if getattr(config, "quantization_config", None):
            return
        with torch.device("meta"):
            model = UMT5EncoderModel(config)
    names: dict[int, list[str]] = {}  # weights that are tied are stored once
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    warn_of_unused_tensors(folder, found.keys() - {name for tied in names.values() for name in tied})
    if missing := sorted(tied[0] for tied in names.values() if not any(name in found for name in tied)):
        raise WeightsError(f"{folder}: does not fit the model; missing: {', '.join(missing[:5])}")


def load_component_tokenizer(folder: Path, text_encoder: Any) -> Any:
    """The tokenizer of a folder's own text encoder; None where that brings it along. Raises WeightsError."""
    if isinstance(text_encoder, WordTextEncoder):
        if not (folder / "tokenizer").is_dir():
            return None
        with explain_read_errors(folder / "tokenizer"):
            tokenizer = WordTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        if tokenizer.ids != text_encoder.tokenizer.ids:
            raise WeightsError(f"{folder}: tokenizer and text_encoder have other words; they are of different models")
        return tokenizer
    return None if text_encoder is None else load_tokenizer(folder, text_encoder.config.vocab_size)
