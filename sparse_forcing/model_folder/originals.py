"""Wan's parts as its makers and others publish them: a module each, with the weights of a file, strictly.

A transformer (Wan, Self-Forcing, CausVid, LongLive, ComfyUI), umT5 (`models_t5_umt5-xxl-enc-bf16.pth`) and Wan 2.1's
autoencoder (`Wan2.1_VAE.pth`). What a file holds is told from the names of its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_forcing.errors import WeightsError
from sparse_forcing.files import PathLike
from sparse_forcing.model_folder.keys import (
    HEAD_DIM,
    abbreviate,
    infer_config,
    select_state,
    strip_wrappers,
    to_diffusers,
)
from sparse_forcing.model_folder.recognise import name_unsupported
from sparse_forcing.weights.parts import explain_read_errors
from sparse_forcing.weights.safe_load import check_state_dict, load_weights, not_finite

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
OTHER_PARTS = re.compile(r"models_t5|models_clip|.*vae", re.IGNORECASE)
"""Beginnings of names that files of other parts have in the folder of an original Wan."""

_UMT5 = {
    "norm1": "layer.0.layer_norm",
    **{f"attn.{name}": f"layer.0.SelfAttention.{name}" for name in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_UMT5_TOP = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}


def find_part(state: Mapping[str, Tensor]) -> str:
    """The folder that a state dict belongs into: transformer, text_encoder or vae."""
    if "token_embedding.weight" in state and any(".pos_embedding." in key for key in state):
        return "text_encoder"
    return "vae" if "decoder.conv1.weight" in state and "conv2.weight" in state else "transformer"


def weight_files(source: Path) -> list[Path]:
    """The weight files of a source: itself, or those of a folder but for other parts. Raises WeightsError."""
    if source.is_file():
        return [source]
    files = sorted(path for path in source.glob("*") if path.suffix.lower() in WEIGHT_SUFFIXES)
    files = [path for path in files if not OTHER_PARTS.match(path.name)]
    # A folder that has both holds the same weights twice; safetensors cannot carry code.
    files = [path for path in files if path.suffix.lower() == ".safetensors"] or files
    if not files:
        raise WeightsError(f"{source}: no weight file ({', '.join(WEIGHT_SUFFIXES)}) in this folder")
    return files


def read_states(source: Path, contents: Mapping[Path, Any], which: str | None) -> dict[str, Tensor]:
    """All tensors of a source's files under the names they have there, without wrappers.

    Args:
        contents: what each file holds.
        which: see `select_state`.

    Raises:
        WeightsError: nothing of that name, or a tensor that two files hold.
    """
    state: dict[str, Tensor] = {}
    for path, content in contents.items():
        part = {}
        for key, tensor in select_state(content, which, source=str(path)).items():
            if (name := strip_wrappers(key)) in part:
                raise WeightsError(f"{source}: several tensors have the same name once prefixes are removed: {name}")
            part[name] = tensor
        if state.keys() & part.keys():
            raise WeightsError(
                f"{path}: repeats tensors of another file, {sorted(state.keys() & part.keys())[0]} first"
            )
        state.update(part)
    if bad := not_finite(state):
        raise WeightsError(f"{source}: tensor {bad} holds NaN or infinite numbers; the checkpoint cannot be used")
    return state


def build_transformer(
    state: Mapping[str, Tensor], source: PathLike, *, head_dim: int = HEAD_DIM, config: Mapping[str, Any] | None = None
) -> Any:
    """A CausalWanTransformer3DModel that holds the tensors of `state`, of either vocabulary.

    Args:
        head_dim: numbers in an attention head, which weights do not tell (128 in every released Wan).
        config: the model's config where it is known; from the shapes when None.

    Raises:
        WeightsError: tensors that do not fit, the first few named; a model that cannot be run here.
    """
    from sparse_forcing.model.transformer import CausalWanTransformer3DModel

    renamed = to_diffusers(state, source=str(source))
    settings = dict(config) if config else infer_config(renamed, head_dim=head_dim, source=str(source))
    if name := name_unsupported(settings):
        raise WeightsError(f"{source}: this is {name}; only text-to-video Wan 2.1 and its causal descendants run here")
    with torch.device("meta"), explain_read_errors(source, f"makes no model with head dimension {head_dim}"):
        model = CausalWanTransformer3DModel(**settings)
    return _fill(model, renamed, source)


def build_text_encoder(state: Mapping[str, Tensor], source: PathLike) -> Any:
    """transformers' UMT5EncoderModel with the tensors of Wan's umT5 file. Raises WeightsError."""
    from transformers import UMT5Config, UMT5EncoderModel

    renamed: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", key)
        if key in _UMT5_TOP:
            renamed[_UMT5_TOP[key]] = tensor
        elif block and block[2] in _UMT5:
            renamed[f"encoder.block.{block[1]}.{_UMT5[block[2]]}.weight"] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise WeightsError(f"{source}: not Wan's umT5; {abbreviate('unknown', unknown)}")
    try:
        vocabulary, width = renamed["shared.weight"].shape
        buckets, heads = renamed["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape
        sizes = {
            "vocab_size": vocabulary,
            "d_model": width,
            "num_heads": heads,
            "relative_attention_num_buckets": buckets,
            "d_kv": renamed["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[0] // heads,
            "d_ff": renamed["encoder.block.0.layer.1.DenseReluDense.wo.weight"].shape[1],
            "num_layers": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise WeightsError(f"{source}: not Wan's umT5; missing or misshapen: {error}") from error
    renamed["encoder.embed_tokens.weight"] = renamed["shared.weight"]
    with torch.device("meta"), explain_read_errors(source, "makes no umT5"):
        model = UMT5EncoderModel(UMT5Config(**sizes))
    model = _fill(model, renamed, source)
    model.tie_weights()
    return model


def build_autoencoder(state: Mapping[str, Tensor], source: PathLike) -> Any:
    """diffusers' AutoencoderKLWan with the tensors of Wan 2.1's autoencoder file. Raises WeightsError."""
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    with explain_read_errors(source, "not Wan 2.1's autoencoder"):
        channels, width = state["conv2.weight"].shape[0], state["encoder.conv1.weight"].shape[0]
        if channels == 48:
            raise WeightsError(f"{source}: this is Wan 2.2's autoencoder (48 latent channels); only Wan 2.1's is used")
        renamed = convert_wan_vae_to_diffusers(dict(state))
        with torch.device("meta"):
            model = AutoencoderKLWan(base_dim=width, z_dim=channels)
    return _fill(model, renamed, source)


BUILDERS = {"text_encoder": build_text_encoder, "vae": build_autoencoder}


def build_part(path: Path) -> tuple[str, Any]:
    """The text encoder or autoencoder in a file, and the name of its folder. Raises WeightsError."""
    state = read_states(path, {path: load_weights(path)}, None)
    name = find_part(state)
    if name not in BUILDERS:
        raise WeightsError(f"{path}: holds neither Wan's umT5 nor its autoencoder")
    return name, BUILDERS[name](state, path)


def _fill(model: Any, state: Mapping[str, Tensor], source: PathLike) -> Any:
    check_state_dict(model.state_dict(), state, source=str(source))
    model.load_state_dict(state, assign=True)
    return model
