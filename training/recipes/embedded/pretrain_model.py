"""What pretraining trains: the model with its learning heads, fresh or grown from another one, and its autoencoder."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_forcing.errors import ConfigError
from sparse_forcing.model.text import WordTextEncoder
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model.vae import PatchAutoencoder, TokenAutoencoder
from sparse_forcing.scenes.captions import vocabulary_words
from sparse_forcing.scenes.sample import SceneBatch
from sparse_forcing.training.data.procedural import procedural_batch
from sparse_forcing.training.recipes.embedded.autoencoder import fit_patches, load_trained_autoencoder
from sparse_forcing.training.recipes.embedded.curriculum import PretrainConfig, StageConfig
from sparse_forcing.training.recipes.embedded.growth import load_leading
from sparse_forcing.training.recipes.embedded.level_balance import LevelBalance
from sparse_forcing.training.recipes.embedded.scene_targets import (
    ATTRIBUTES,
    COURSE_NUMBERS,
    POSE_NUMBERS,
    attribute_targets,
)

EmbeddedAutoencoder = PatchAutoencoder | TokenAutoencoder
LARGEST_LATENT_DRIFT = 0.04  # squared, of the variance; latents of another autoencoder are at 2


class TextToVideo(nn.Module):
    """The parts that learn together, so that one optimizer, average and checkpoint hold them."""

    def __init__(self, config: PretrainConfig, latent_std: list[float]) -> None:
        super().__init__()
        self.text_encoder = WordTextEncoder(
            vocabulary_words(), dim=config.text_dim, text_len=config.text_len, neighbours=config.text_neighbours
        )
        self.transformer = CausalWanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            in_channels=len(latent_std),
            out_channels=len(latent_std),
            text_dim=config.text_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            chunk_frames=config.chunk_frames,
            horizon_frames=config.horizon_frames,
            pooled_text=True,
            latent_std=latent_std,
            position_harmonics=config.position_harmonics,
        )
        width = config.num_attention_heads * config.attention_head_dim
        self.pose_head, self.course_head = nn.Linear(width, POSE_NUMBERS), nn.Linear(width, COURSE_NUMBERS)
        self.attribute_head = nn.Linear(config.text_dim, ATTRIBUTES)
        self.sizes = sorted({size for stage in config.stages for size in stage.sizes})
        self.balance = LevelBalance(2 * len(self.sizes), shift=config.shift, spread=config.sigma_spread)
        self.features: dict[nn.Linear, Tensor] = {}
        for head, layer in ((self.pose_head, config.pose_layer), (self.course_head, config.course_layer)):
            self.transformer.blocks[layer].register_forward_hook(partial(self._keep_features, head))

    def _keep_features(self, head: nn.Linear, block: nn.Module, inputs: object, tokens: Tensor) -> None:
        self.features[head] = tokens

    def task(self, part: StageConfig) -> int:
        """The row of the balance for what a step learns."""
        return 2 * self.sizes.index(part.sizes[0]) + int(part.continuation > 0)

    def attribute_loss(self, text: Tensor, captions: list[str], scenes: SceneBatch) -> Tensor:
        """Cross-entropy of what captions say, read off the text [B, text_len, dim], pooled as the transformer sees it;
        dropped captions (empty ones) say nothing."""
        used = (text != 0).any(-1, keepdim=True)
        logits = self.attribute_head((text * used).sum(1) / used.sum(1).clamp(min=1))
        targets, counted = attribute_targets(scenes)
        error = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        error = (error * counted).sum(1) / counted.sum(1)
        told = find_captioned(captions, error.device)
        return (error * told).sum() / told.sum().clamp(min=1)

    def token_loss(self, head: nn.Linear, targets: Tensor, counted: Tensor) -> Tensor:
        """Squared error of what a head reads off the noisy tokens of the last forward pass against targets [B, tokens,
        numbers], over the clips that count [B]."""
        features = self.features.pop(head)[:, -targets.shape[1] :]
        error = (head(features.float()) - targets).square().mean((1, 2))
        return (error * counted).mean()


def find_captioned(captions: list[str], device: torch.device) -> Tensor:
    """[B] bool: which captions were not dropped."""
    return torch.tensor([caption != "" for caption in captions], device=device)


def make_autoencoder(config: PretrainConfig) -> tuple[EmbeddedAutoencoder, list[float]]:
    """The autoencoder and its latents' standard deviations: a trained one, or patches fitted on clips of their own."""
    if config.autoencoder is not None:
        vae = load_trained_autoencoder(config.autoencoder, "autoencoder")
        return vae, [1.0] * vae.latent_channels
    patches = PatchAutoencoder(config.latent_channels)
    return patches, fit_patches(patches, config.loop.seed, config.fit_clips)


def make_models(config: PretrainConfig) -> tuple[EmbeddedAutoencoder, TextToVideo]:
    """Autoencoder and model: fresh, or those of `init_from`, or its model and an `autoencoder` whose latents begin like
    those it knows."""
    if config.init_from is None:
        with torch.device("meta"):
            TextToVideo(config, [1.0] * config.latent_channels)  # refuses what cannot be before clips are drawn
        vae, latent_std = make_autoencoder(config)
        return vae, TextToVideo(config, latent_std)
    from sparse_forcing.sampling.pipeline import SparseForcingPipeline

    pipe = SparseForcingPipeline.from_pretrained(config.init_from)
    if not isinstance(pipe.vae, EmbeddedAutoencoder) or not isinstance(pipe.text_encoder, WordTextEncoder):
        raise ConfigError(f"init_from: {config.init_from} is not a model of this recipe's kind")
    known = pipe.text_encoder.config.neighbours
    if known not in (0, config.text_neighbours):
        raise ConfigError(f"text_neighbours: {config.init_from} has {known}, got {config.text_neighbours}")
    vae, std = pipe.vae, list(pipe.transformer.config.latent_std)
    if config.autoencoder is not None:
        vae, std = make_autoencoder(config)
        check_leading_latents(vae, pipe.vae, config)
    model = TextToVideo(config, std)
    try:
        load_leading(
            model.transformer, pipe.transformer.state_dict(), readers=("patch_embedding.",), writers=("proj_out.",)
        )
        text = model.text_encoder.convolutions.state_dict(prefix="convolutions.")  # new ones change nothing at first
        text = {name: torch.zeros_like(weight) for name, weight in text.items()} | pipe.text_encoder.state_dict()
        load_leading(model.text_encoder, text, readers=(), writers=())
    except ConfigError as error:
        raise ConfigError(f"init_from: {config.init_from} has another shape than this config: {error}") from error
    return vae, model


@torch.no_grad()
def check_leading_latents(new: EmbeddedAutoencoder, known: EmbeddedAutoencoder, config: PretrainConfig) -> None:
    """Refuse (ConfigError) an autoencoder whose first channels are not those that the model of `init_from` knows."""
    pixels = procedural_batch(
        config.loop.seed,
        0,
        batch_size=8,
        num_frames=known.temporal_stride,
        size=config.stages[0].sizes[0],
        two_object_fraction=0.0,
        caption_dropout=0.0,
    ).pixels
    before, after = known.encode(pixels), new.encode(pixels)[:, : known.latent_channels]
    if before.shape != after.shape or (after - before).square().mean() > LARGEST_LATENT_DRIFT * before.square().mean():
        raise ConfigError(
            f"autoencoder: the latents of {config.autoencoder} do not begin like those that {config.init_from} knows"
        )
