"""A tiny random Wan 2.1, as diffusers publishes it and as its makers do: the same tensors under both names."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from sparse_forcing.model_folder.keys import to_wan
from sparse_forcing.sampling.pipeline import SparseForcingPipeline

HEADS, HEAD_DIM, TEXT_DIM = 2, 24, 32
WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "text_dim": TEXT_DIM, "freq_dim": 32, "ffn_dim": 64,
    "num_layers": 2, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
}  # fmt: skip
VIDEO = {"height": 32, "width": 32, "num_frames": 9}


def load(folder: Path | str, **options: Any) -> SparseForcingPipeline:
    """A folder's pipeline, which shows no progress."""
    pipe = SparseForcingPipeline.from_pretrained(str(folder), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_wan(folder: Path, shift: float = 3.0) -> Path:
    """The diffusers folder: plain Wan, whose scheduler has this flow_shift."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(**TRANSFORMER)
    for parameter in transformer.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    transformer.save_pretrained(folder / "transformer")
    AutoencoderKLWan(base_dim=4, z_dim=16).save_pretrained(folder / "vae")
    config = UMT5Config(vocab_size=60, d_model=TEXT_DIM, d_kv=8, d_ff=16, num_layers=2, num_heads=4)
    UMT5EncoderModel(config).eval().save_pretrained(folder / "text_encoder")
    write_beside(folder, shift)
    return folder


def write_beside(folder: Path, shift: float) -> None:
    """What a diffusers folder holds beside models: tokenizer, scheduler, index."""
    words = ["<pad>", "</s>", "<unk>", *"a cat dog red blue on the ball rolls slowly".split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    ).save_pretrained(folder / "scheduler")
    parts = {"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan", "scheduler": "UniPCMultistepScheduler"}
    index = {name: ["diffusers", kind] for name, kind in parts.items()}
    index |= {"text_encoder": ["transformers", "UMT5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **index}))


def wan_state(folder: Path) -> dict[str, Tensor]:
    """The transformer's tensors under Wan's names."""
    return to_wan(load_file(folder / "transformer" / WEIGHTS))


def write_original(source: Path, folder: Path) -> Path:
    """The same model in the layout of Wan's own release."""
    folder.mkdir()
    save_file(wan_state(source), folder / WEIGHTS)
    config = {"_class_name": "WanModel", "model_type": "t2v", "dim": HEADS * HEAD_DIM, "num_heads": HEADS}
    (folder / "config.json").write_text(json.dumps(config))
    text = load_file(source / "text_encoder" / "model.safetensors")
    torch.save(
        {_umt5_key(key): x for key, x in text.items() if "embed_tokens" not in key},
        folder / "models_t5_umt5-xxl-enc-bf16.pth",
    )
    vae = load_file(source / "vae" / WEIGHTS)
    torch.save({_vae_key(key): x for key, x in vae.items()}, folder / "Wan2.1_VAE.pth")
    shutil.copytree(source / "tokenizer", folder / "google" / "umt5-xxl")
    return folder


def _umt5_key(key: str) -> str:
    if key == "shared.weight":
        return "token_embedding.weight"
    for new, old in (
        ("encoder.final_layer_norm", "norm"),
        ("encoder.block", "blocks"),
        ("layer.0.layer_norm", "norm1"),
        ("layer.1.layer_norm", "norm2"),
        ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
        ("layer.0.SelfAttention", "attn"),
        ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"),
        ("layer.1.DenseReluDense.wi_1", "ffn.fc1"),
        ("layer.1.DenseReluDense.wo", "ffn.fc2"),
    ):
        key = key.replace(new, old)
    return key


def _vae_key(key: str) -> str:
    """The autoencoder's flat names: residual blocks and resamplers of the decoder are numbered through."""
    if match := re.match(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)\.", key):
        number = 4 * int(match[1]) + (int(match[3]) if match[2] == "resnets" else 3)
        key = f"decoder.upsamples.{number}." + key[match.end() :]
    key = key.replace("encoder.down_blocks.", "encoder.downsamples.")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"middle.{2 * int(match[1])}", key)
    key = key.replace("mid_block.attentions.0", "middle.1")
    for new, old in (
        ("post_quant_conv.", "conv2."),
        ("quant_conv.", "conv1."),
        ("conv_in.", "conv1."),
        ("norm_out.", "head.0."),
        ("conv_out.", "head.2."),
        ("conv_shortcut.", "shortcut."),
    ):
        key = key.replace(new, old)
    if "middle" in key or "samples" in key:
        for new, old in (("norm1", "0"), ("conv1", "2"), ("norm2", "3"), ("conv2", "6")):
            key = re.sub(rf"(\.\d+)\.{new}\.", rf"\1.residual.{old}.", key)
    return key
