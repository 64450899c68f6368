"""Where the parts of a model compute, and by what it decodes: what --offload, --tiny-vae and --tiled-decoding mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparse_forcing.errors import ConfigError
from sparse_forcing.sampling.generation.jobs import GenerateConfig

if TYPE_CHECKING:
    from sparse_forcing.model_folder.defaults import PipelineConfig
    from sparse_forcing.sampling.pipeline import SparseForcingPipeline


def check_placement(config: GenerateConfig, defaults: PipelineConfig, device: str) -> None:
    """What can be known before a model is loaded.

    Raises:
        ConfigError: settings that this model or device has no use for. WeightsError: a file that is no tiny decoder.
    """
    if config.offload != "none" and device.startswith("cpu"):
        raise ConfigError(f"--offload {config.offload} moves parts between a GPU and the CPU; here all is on the CPU")
    check_decoder(config, defaults)
    if config.tiny_vae is not None:
        from sparse_forcing.model.small.tiny_decoder import TinyDecoder

        TinyDecoder.from_file(config.tiny_vae)


def check_decoder(config: GenerateConfig, defaults: PipelineConfig) -> None:
    """Raise ConfigError for a decoder in place of one that is small itself."""
    for name, wanted in (("--tiny-vae", config.tiny_vae), ("--tiled-decoding", config.tiled_decoding)):
        if wanted and defaults.vae != "wan":
            raise ConfigError(f"{name} is for Wan's autoencoder; {config.model} has one of its own, of a few megabytes")


def place(pipe: SparseForcingPipeline, config: GenerateConfig, device: str, text_encoder_device: str) -> None:
    """Bring a pipeline to its device, whole or in parts as they are needed, and choose its decoder."""
    pipe.use_tiny_decoder(config.tiny_vae)
    if config.tiled_decoding:
        pipe.vae.enable_tiling()
    if config.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif config.offload == "blocks":
        # All but the blocks is small; while one computes the next one comes.
        pipe.enable_group_offload(
            torch.device(device),
            offload_type="block_level",
            num_blocks_per_group=1,
            exclude_modules="vae",
            use_stream=device.startswith("cuda"),
        )
    else:
        pipe.to(device, text_encoder_device=text_encoder_device)
