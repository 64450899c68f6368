"""Small pipelines of random weights: one of embedded parts, one of Wan's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model.text import WordTextEncoder
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model.vae import TokenAutoencoder
from sparse_forcing.model_folder.folder import PipelineConfig
from sparse_forcing.sampling.pipeline import SparseForcingPipeline

PROMPT = "a red ball"
SHORT: dict[str, Any] = {"num_frames": 16}  # two chunks


def make_transformer(**changes: Any) -> CausalWanTransformer3DModel:
    sizes: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "chunk_frames": 2,
        "horizon_frames": 6,
    }
    model = CausalWanTransformer3DModel(**sizes | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def make_pipe(selector_tokens: int | None = 8, vae: Any = None) -> SparseForcingPipeline:
    torch.manual_seed(0)
    vae = vae or TokenAutoencoder(16, components=32, dim=16, num_blocks=1)
    transformer = make_transformer(
        patch_size=(1, 1, 1), pooled_text=True, position_harmonics=1, selector_tokens=selector_tokens
    )
    text = WordTextEncoder(["a", "ball", "blue", "red"], dim=16, num_layers=1, text_len=6, neighbours=3)
    config = PipelineConfig(
        fps=8.0,
        height=32,
        width=32,
        num_frames=16,
        text_encoder="words",
        vae="token",
        sampler=SamplerConfig(kind="euler", steps=2, shift=6.0, guidance_scale=2.0),
        memory=MemoryConfig(kind="sparse", window_frames=4, tile=(2, 2, 2), persistent_blocks=2, density=0.5),
    )
    return SparseForcingPipeline(transformer, text.eval(), vae.eval(), config)


def make_wan(chunk_frames: int) -> SparseForcingPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, z_dim=16)
    text = UMT5EncoderModel(UMT5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    sampler = SamplerConfig(kind="unipc", steps=3, shift=3.0, guidance_scale=4.0)
    defaults = PipelineConfig(height=32, width=32, num_frames=9, sampler=sampler, memory=MemoryConfig(kind="full"))
    transformer = make_transformer(chunk_frames=chunk_frames, horizon_frames=chunk_frames)
    return SparseForcingPipeline(transformer, text.eval(), vae.eval(), defaults)


def run(pipe: SparseForcingPipeline, prompt: Any = PROMPT, seed: int = 0, **settings: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **SHORT | settings).frames


def load(folder: Path, **options: Any) -> SparseForcingPipeline:
    return SparseForcingPipeline.from_pretrained(str(folder), **options)
