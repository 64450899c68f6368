"""The causal video diffusion transformer: Wan 2.1's architecture with per-frame timesteps and pluggable self-attention.

Configuration and state-dict keys are those of diffusers' WanTransformer3DModel, so Wan and Self-Forcing weights load.
Legend: B batch, C channels, F latent frames, G groups of tokens that share a timestep, L tokens, H heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_forcing.errors import ConfigError
from sparse_forcing.kernels.token_rows.interface import (
    add_gated,
    add_norm,
    modulated_norm,
    norm_rotate,
    norm_rotate_pairs,
)
from sparse_forcing.model.attention import AttentionPolicy, ParallelAttention, dense_attention
from sparse_forcing.model.joined import JoinedWeights
from sparse_forcing.model.layers import (
    ConditionEmbedder,
    FeedForward,
    PatchEmbedding,
    RMSNorm,
    WideLayerNorm,
    convert_to_flow,
    frame_position_waves,
    is_hooked,
    scale_input,
)
from sparse_forcing.model.rope import Rotary, apply_rotary
from sparse_forcing.model.selector import BlockSelector
from sparse_forcing.model.sequence_parallel import SequenceParallel

TextKeysValues = list[tuple[Tensor, Tensor]]
"""Per layer: cross-attention keys and values [B, text tokens, H, D]."""


class Attention(nn.Module):
    """Projections and norms of one attention layer; what is attended to is decided outside."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)
        self._together: JoinedWeights | None = None

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def _norm_and_rotate(self, x: Tensor, norm: RMSNorm, rotary: Rotary | None) -> Tensor:
        if rotary is None:
            return self._heads(norm(x))
        if is_hooked(norm):
            return apply_rotary(self._heads(norm(x)), rotary)
        return norm_rotate(x, norm.weight, norm.eps, rotary.cos, rotary.sin)

    def queries(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        """[B, L, H, D], normed, and rotated where a table is given."""
        return self._norm_and_rotate(self.to_q(x), self.norm_q, rotary)

    def keys_values(self, x: Tensor, rotary: Rotary | None = None) -> tuple[Tensor, Tensor]:
        """Both [B, L, H, D]; keys normed, and rotated where a table is given."""
        return self._norm_and_rotate(self.to_k(x), self.norm_k, rotary), self._heads(self.to_v(x))

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x [B, L, C], all [B, L, H, D]: one product where their weights are together."""
        infers = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
        joined = self._join_weights() if infers and x.dtype == torch.float32 else None
        if joined is None:
            return self.queries(x, rotary), *self.keys_values(x, rotary)
        products = F.linear(x, joined.weight, joined.bias).unflatten(-1, (3, -1))
        found = norm_rotate_pairs(products[:, :, :2], joined.norms, self.norm_q.eps, rotary.cos, rotary.sin)
        return found[:, :, 0], found[:, :, 1], self._heads(products[:, :, 2])

    def _join_weights(self) -> JoinedWeights | None:
        """The weights of the three products, laid side by side on first use; None where they are not plain ones."""
        layers, norms = (self.to_q, self.to_k, self.to_v), (self.norm_q, self.norm_k)
        if self._together is None or not self._together.holds(layers, norms):
            self._together = JoinedWeights.of(layers, norms)
        return self._together

    def output(self, x: Tensor) -> Tensor:
        return self.to_out[0](x.flatten(2))


class CausalWanBlock(nn.Module):
    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        heads: int,
        cross_attn_norm: bool,
        eps: float,
        selector_tokens: int | None,
        learned_retention: bool = False,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.selector = None
        if selector_tokens:
            self.selector = BlockSelector(heads, selector_tokens, dim // heads, learned_retention=learned_retention)
        self.attn1 = Attention(dim, heads, eps)
        self.attn2 = Attention(dim, heads, eps)
        self.norm2 = WideLayerNorm(dim, eps) if cross_attn_norm else None
        self.ffn = FeedForward(dim, ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def encode_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-attention keys and values of embedded text [B, T, C]."""
        return self.attn2.keys_values(text)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Tensor | tuple[Tensor, Tensor],
        rotary: Rotary,
        policy: AttentionPolicy,
        layer: int,
    ) -> Tensor | None:
        """x [B, L, C], modulation [B, G, 6, C], text embedded or as keys and values -> [B, L, C] or None: the end."""
        table = (self.scale_shift_table[:, None] + modulation).to(x.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(2)

        h = modulated_norm(x, shift1, scale1, self.eps)
        attended = policy.attend(layer, *self.attn1.project(h, rotary))
        if attended is None:
            return None
        update, gate, norm2 = self.attn1.output(attended), gate1, self.norm2
        if norm2 is None:
            h = x = add_gated(x, update, gate)
        elif is_hooked(norm2):
            x = add_gated(x, update, gate)
            h = norm2(x)
        else:
            x, h = add_norm(x, update, gate, norm2.bias, norm2.weight, self.eps, modulates=False)
        text_keys_values = text if isinstance(text, tuple) else self.attn2.keys_values(text)
        update = self.attn2.output(dense_attention(self.attn2.queries(h), *text_keys_values))
        x, h = add_norm(x, update, None, shift2, scale2, self.eps, modulates=True)
        return add_gated(x, self.ffn(h), gate2)


def _as_output(flow: Tensor, return_dict: bool | None) -> Any:
    if return_dict is None:
        return flow
    return Transformer2DModelOutput(sample=flow) if return_dict else (flow,)


class CausalWanTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """Wan 2.1 with per-frame timesteps and a self-attention that a policy decides (Self-Forcing, arXiv 2506.08009).

    Args beyond diffusers' WanTransformer3DModel:
        chunk_frames: latent frames generated at a time.
        horizon_frames: latent frames of a training video; relative positions stay inside it.
        pooled_text: add the mean text token to the time embedding.
        latent_std: per-channel standard deviation of the latents; when given, inputs and outputs are preconditioned
            so that the network sees and predicts unit variance at every noise level (forward still returns the flow).
        position_harmonics: sine and cosine pairs, per axis, of an embedding that tells every token where in the frame
            it is; 0 for none (Wan). Rotary positions are relative: a small model hardly finds edges by them alone.
        selector_tokens: tokens of a block of the sparse memory, to give every layer a learned block selector; None
            selects by mean pooling.
        learned_retention: whether these selectors have a head for the `learned` rule of retention.
    """

    sequence_parallel: SequenceParallel | None = None
    """The processes that run this model together on one video; None: this one alone."""
    _supports_gradient_checkpointing = True
    _no_split_modules = ("CausalWanBlock",)
    _repeated_blocks = ("CausalWanBlock",)
    _skip_layerwise_casting_patterns = (
        "patch_embedding",
        "position_embedder",
        "condition_embedder",
        "norm",
        "selector",
    )

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        chunk_frames: int = 3,
        horizon_frames: int = 21,
        pooled_text: bool = False,
        latent_std: list[float] | None = None,
        position_harmonics: int = 0,
        selector_tokens: int | None = None,
        learned_retention: bool = False,
    ) -> None:
        super().__init__()
        if learned_retention and not selector_tokens:
            raise ConfigError("learned_retention: is part of a block selector; set selector_tokens")
        if qk_norm != "rms_norm_across_heads" or image_dim or added_kv_proj_dim or pos_embed_seq_len:
            raise ConfigError(
                "transformer config: only text-to-video Wan is supported (qk_norm='rms_norm_across_heads', no "
                f"image_dim, added_kv_proj_dim or pos_embed_seq_len), got qk_norm={qk_norm!r}, image_dim={image_dim!r}"
            )
        if attention_head_dim % 2 or attention_head_dim < 6:
            raise ConfigError(f"attention_head_dim: must be even and at least 6, got {attention_head_dim}")
        if patch_size[0] != 1:
            raise ConfigError(f"patch_size: only one latent frame per token is supported, got {tuple(patch_size)}")
        if latent_std is not None and len(latent_std) != in_channels:
            raise ConfigError(f"latent_std: {len(latent_std)} values for {in_channels} channels")
        dim = num_attention_heads * attention_head_dim
        patch = (int(patch_size[0]), int(patch_size[1]), int(patch_size[2]))
        self.patch_embedding = PatchEmbedding(in_channels, dim, patch, patch)
        self.position_embedder = nn.Linear(4 * position_harmonics, dim) if position_harmonics else None
        self.condition_embedder = ConditionEmbedder(dim, freq_dim, text_dim, pooled_text)
        self.blocks = nn.ModuleList(
            CausalWanBlock(dim, ffn_dim, num_attention_heads, cross_attn_norm, eps, selector_tokens, learned_retention)
            for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(dim, out_channels * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.gradient_checkpointing = False
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Xavier linears, small embeddings, a silent output head and a time projection that starts at the tables."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        for mlp in (self.condition_embedder.time_embedder, self.condition_embedder.text_embedder):
            nn.init.normal_(mlp.linear_1.weight, std=0.02)
            nn.init.normal_(mlp.linear_2.weight, std=0.02)
        nn.init.zeros_(self.condition_embedder.time_proj.weight)
        nn.init.zeros_(self.proj_out.weight)

    @property
    def selectors(self) -> list[BlockSelector] | None:
        """The learned selector of each layer, for a sparse memory; None: mean pooling."""
        if not self.config.selector_tokens:
            return None
        return [block.selector for block in self.blocks if isinstance(block, CausalWanBlock) and block.selector]

    def encode_text(self, encoder_hidden_states: Tensor) -> TextKeysValues | None:
        """Cross-attention keys and values of every layer for text [B, T, text_dim]; constant through a rollout. None
        where hooks bring weights for the time of a pass: then every pass makes its own."""
        if any(is_hooked(module) for module in self.modules()):
            return None
        text = self.condition_embedder.text_embedder(encoder_hidden_states)
        return [block.encode_text(text) for block in self.blocks]  # type: ignore[operator]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        policy: AttentionPolicy | None = None,
        text_keys_values: TextKeysValues | None = None,
        clean_hidden_states: Tensor | None = None,
        clean_timestep: Tensor | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Flow v = noise - x0 of every latent.

        Args:
            hidden_states: [B, C, F, H, W] noisy latents.
            timestep: [B] or [B, F] in [0, 1000].
            encoder_hidden_states: [B, T, text_dim] text embeddings, padded rows exactly zero (they are attended to).
            policy: what self-attention sees; bidirectional when None.
            text_keys_values: result of `encode_text` for the same text, to spare its recomputation in a rollout.
            clean_hidden_states: [B, C, G, H, W] clean latents that precede the noisy ones in the token sequence
                (teacher forcing); the policy must then cover G + F frames.
            clean_timestep: [B] or [B, G] of the clean part; 0 when None.
            attention_kwargs, return_dict: those of diffusers' transformers; the first one has no effect, and the bare
                tensor is returned where the second one is None.

        Returns:
            [B, out_channels, F, H, W] flow of the noisy part; None of a pass that its policy ends: the clean pass of a
            memory, which leaves all there is of it there.
        """
        frames, height, width = hidden_states.shape[2:]
        x, timestep = hidden_states, self._group(timestep, frames)
        clean_frames = 0
        if clean_hidden_states is not None:
            clean_frames = clean_hidden_states.shape[2]
            clean = timestep.new_zeros(len(x), 1) if clean_timestep is None else clean_timestep
            timestep = torch.cat([self._group(clean, clean_frames, expand=True), timestep.expand(-1, frames)], 1)
            x = torch.cat([clean_hidden_states, x], 2)
        sigma = timestep[:, None, :, None, None] / 1000

        _, ph, pw = self.config.patch_size
        rows, cols = height // ph, width // pw
        tokens = self._embed_patches(scale_input(x, sigma, self.config.latent_std))
        embedding, modulation = self.condition_embedder(timestep, encoder_hidden_states)
        attention: AttentionPolicy = policy or ParallelAttention(x.shape[2])
        table_dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        rotary = attention.rotary(rows, cols, self.config.attention_head_dim, table_dtype, tokens.device)
        texts: list = text_keys_values or self._same_text(encoder_hidden_states)
        computed = self._run_blocks(tokens, modulation, texts, rotary, attention)
        if computed is None:
            return None
        tokens = computed[:, clean_frames * rows * cols :]
        if clean_frames:
            embedding, sigma = embedding[:, clean_frames:], sigma[:, :, clean_frames:]
        shift, scale = (self.scale_shift_table[:, None] + embedding[:, :, None]).to(tokens.dtype).unbind(2)
        tokens = self.proj_out(modulated_norm(tokens, shift, scale, self.config.eps))
        out = rearrange(tokens, "b (f r c) (p q ch) -> b ch f (r p) (c q)", f=frames, r=rows, c=cols, p=ph, q=pw)
        return _as_output(convert_to_flow(out, hidden_states, sigma, self.config.latent_std), return_dict)

    def _same_text(self, encoder_hidden_states: Tensor) -> list[Tensor]:
        """The embedded text for every block: without cached keys and values each projects it itself, where sharding and
        checkpointing expect its weights."""
        return [self.condition_embedder.text_embedder(encoder_hidden_states)] * len(self.blocks)

    def _run_blocks(
        self, tokens: Tensor, modulation: Tensor, texts: list, rotary: Rotary, attention: AttentionPolicy
    ) -> Tensor | None:
        """All blocks over frame-major tokens [B, L, C]; inside, tokens lie in the order the policy asks for, and each
        of several processes has a part of them."""
        order, parallel, count = attention.token_order(tokens.device), self.sequence_parallel, tokens.shape[1]
        if modulation.shape[1] > 1 and (order is not None or parallel is not None):
            what = "sequence parallelism" if order is None else "tile order"
            raise ConfigError(f"timestep: {what} needs one timestep per sample and pass, got one per frame")
        if order is not None:
            tokens = order.arrange(tokens)
        if parallel is not None:
            tokens, rotary, attention = parallel.split(tokens, rotary, attention)
        for layer, (block, text) in enumerate(zip(self.blocks, texts, strict=True)):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, modulation, text, rotary, attention, layer, use_reentrant=False)
            else:
                tokens = block(tokens, modulation, text, rotary, attention, layer)
        if tokens is None:
            return None
        if parallel is not None:
            tokens = parallel.join(tokens, count)
        return tokens if order is None else order.restore(tokens)

    @staticmethod
    def _group(timestep: Tensor, frames: int, expand: bool = False) -> Tensor:
        """[B] -> [B, 1]; [B, F] stays; anything else is an error."""
        timestep = timestep[:, None] if timestep.ndim == 1 else timestep
        if timestep.ndim != 2 or timestep.shape[1] not in (1, frames):
            raise ConfigError(f"timestep: expected [B] or [B, {frames}], got {list(timestep.shape)}")
        return timestep.expand(-1, frames) if expand else timestep

    def _embed_patches(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> tokens [B, F*R*C, dim]."""
        _, ph, pw = self.config.patch_size
        tokens = rearrange(self.patch_embedding(x), "b d f r c -> b (f r c) d")
        if self.position_embedder is None:
            return tokens
        waves = frame_position_waves(x.shape[3] // ph, x.shape[4] // pw, self.config.position_harmonics, x.device)
        position = self.position_embedder(waves.to(self.position_embedder.weight.dtype)).to(tokens.dtype)
        return tokens + position.repeat(x.shape[2], 1)
