"""Sizes of a model folder, read from its configs; a folder that is not there counts as the published model it names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sparse_forcing.config import constructor_settings
from sparse_forcing.errors import WeightsError
from sparse_forcing.files import read_json
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.geometry import VideoGeometry
from sparse_forcing.model.text import WAN_TEXT_LEN, WordTextEncoder
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model.vae import WanAutoencoder
from sparse_forcing.model_folder.folder import (
    EMBEDDED_AUTOENCODERS,
    EMBEDDED_MODELS,
    PipelineConfig,
    find_model,
    read_defaults,
)
from sparse_forcing.weights.parts import CONFIG, check_part, explain_read_errors
from sparse_forcing.weights.safe_load import MAX_CONFIG_BYTES

WAN: dict[str, dict[str, Any]] = {
    "1.3b": {},
    "14b": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
}
"""Transformers of Wan 2.1 (wan_t2v_1_3B.py, wan_t2v_14B.py), as changes to the defaults."""
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24}
"""Wan 2.1's text encoder."""


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The sizes of a model, without its weights.

    transformer: its config; rows, cols: tokens of a latent frame; text: its text encoder, without storage;
    autoencoder_bytes: size of the autoencoder; notes: what was assumed.
    """

    transformer: dict[str, Any]
    rows: int
    cols: int
    text_len: int
    text: torch.nn.Module
    autoencoder_bytes: int
    memory: MemoryConfig
    notes: list[str]

    @property
    def text_bytes(self) -> int:
        """Size of the text encoder, in float32."""
        return _bytes(self.text)


def on_meta(config: dict[str, Any]) -> CausalWanTransformer3DModel:
    """The transformer of a config, without storage; not to be changed."""
    return _on_meta(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=8)
def _on_meta(config: str) -> CausalWanTransformer3DModel:
    with torch.device("meta"):
        return CausalWanTransformer3DModel(**json.loads(config))


def model_sizes(name: str) -> ModelSizes:
    """Sizes of a model by name or folder.

    Raises:
        WeightsError: no such folder, and its name holds none of the published sizes.
    """
    try:
        return _of_folder(find_model(name), [])
    except WeightsError:
        if (Path(name) / "transformer").is_dir():
            raise
        parts = Path(name).as_posix().lower()
        if known := next((size for size in WAN if f"wan-{size}" in parts), None):
            return _of_wan(known, [f"{name} is not here: counted as Wan 2.1 {known.upper()}"])
        if embedded := next((x.name for x in sorted(EMBEDDED_MODELS.iterdir()) if x.name in parts), None):
            return _of_folder(EMBEDDED_MODELS / embedded, [f"{name} is not here: counted as {embedded}"])
        raise


def _of_folder(folder: Path, notes: list[str]) -> ModelSizes:
    defaults, transformer = read_defaults(folder), _config(folder / "transformer")
    text_config, vae_config = _config(folder / "text_encoder"), _config(folder / "vae")
    for part in ("transformer", "text_encoder", "vae"):
        check_part(folder / part)  # absurd counts, before a layer is built
    with torch.device("meta"), explain_read_errors(folder, "its configs cannot be used"):
        if defaults.text_encoder == "words":
            text: torch.nn.Module = WordTextEncoder(**text_config)
            text_len = text_config["text_len"]
        else:
            text, text_len = _umt5(text_config), WAN_TEXT_LEN
        vae = autoencoder_of(defaults.vae, vae_config)
        return _sizes(transformer, defaults, text, text_len, vae, notes)


def _of_wan(size: str, notes: list[str]) -> ModelSizes:
    with torch.device("meta"):
        return _sizes(WAN[size], PipelineConfig(), _umt5(UMT5_XXL), WAN_TEXT_LEN, autoencoder_of("wan", {}), notes)


def _umt5(config: dict[str, Any]) -> torch.nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(**config))


def autoencoder_of(kind: str, config: dict[str, Any]) -> Any:
    """The autoencoder of a config; on the device meta where that is the default."""
    if kind in EMBEDDED_AUTOENCODERS:
        return EMBEDDED_AUTOENCODERS[kind](**config)
    from diffusers import AutoencoderKLWan

    return WanAutoencoder(AutoencoderKLWan(**config))


def _sizes(
    transformer: dict[str, Any],
    defaults: PipelineConfig,
    text: torch.nn.Module,
    text_len: int,
    vae: Any,
    notes: list[str],
) -> ModelSizes:
    geometry = VideoGeometry.of(vae, on_meta(transformer).config)
    rows, cols = geometry.token_size(*geometry.latent_size(defaults.height, defaults.width))
    return ModelSizes(
        transformer=transformer,
        rows=rows,
        cols=cols,
        text_len=text_len,
        text=text,
        autoencoder_bytes=_bytes(vae),
        memory=defaults.memory,
        notes=notes,
    )


def _bytes(module: torch.nn.Module) -> int:
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG, max_bytes=MAX_CONFIG_BYTES, expected="the config of a model")
    if not isinstance(config, dict):
        raise WeightsError(f"{folder / CONFIG}: not a table of settings; the config is damaged")
    return constructor_settings(config)
