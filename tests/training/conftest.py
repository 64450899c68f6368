"""A model folder small enough that a training step takes milliseconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.model.text import WordTextEncoder
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model.vae import PatchAutoencoder
from sparse_forcing.model_folder.folder import PipelineConfig
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.scenes.captions import vocabulary_words

SIZE, CHUNK, HORIZON, CHANNELS = 32, 2, 4, 6
SPARSE = MemoryConfig(kind="sparse", window_frames=4, tile=(2, 2, 2), persistent_blocks=1, density=0.5)


def make_pipeline(**changes) -> SparseForcingPipeline:
    """A random model of 32 x 32 pixels, 4 x 4 tokens a frame, chunks of 2 latent frames."""
    torch.manual_seed(0)
    transformer = CausalWanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
        chunk_frames=CHUNK,
        horizon_frames=HORIZON,
        **changes,
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "selector" in name:
                continue
            parameter.add_(torch.randn_like(parameter) * 0.05)
    text_encoder = WordTextEncoder(vocabulary_words(), dim=8, num_layers=1, num_heads=2, text_len=16)
    config = PipelineConfig(
        fps=8.0,
        height=SIZE,
        width=SIZE,
        num_frames=4 * HORIZON,
        text_encoder="words",
        vae="patch",
        memory=SPARSE,
        sampler=SamplerConfig(steps=2),
    )
    return SparseForcingPipeline(transformer.eval(), text_encoder.eval(), PatchAutoencoder(CHANNELS), config)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def selector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a learned block selector."""
    folder = tmp_path_factory.mktemp("model") / "selector"
    make_pipeline(selector_tokens=8).save_pretrained(folder)
    return folder
