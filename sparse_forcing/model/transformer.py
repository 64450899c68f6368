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
from sparse_forcing.model.attention import AttentionPolicy, ParallelAttention, dense_attention
from sparse_forcing.model.rope import Rotary, apply_rotary
from sparse_forcing.model.selector import BlockSelector

_GELU = 2 * math.sqrt(2 / math.pi)
TextKeysValues = dict[int, tuple[Tensor, Tensor]]
"""By layer: cross-attention keys and values [B, text tokens, H, D]. Given empty to the first pass over a text, which
fills it, and as it is to those that follow: they do not change. Blocks fill it themselves, because hooks that move or
gather weights (offloading, sharding) act when a module is called."""


def timestep_sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """[..., dim] = [cos | sin] of timestep * 10000^(-j / (dim/2)), computed in float64."""
    half = dim // 2
    frequencies = torch.pow(10_000.0, -torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angles = timestep.double()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def frame_position_waves(rows: int, cols: int, harmonics: int, device: torch.device) -> Tensor:
    """[rows * cols, 4 * harmonics]: sines and cosines of 1, 2, ... turns across and down the frame, at token centres.

    They depend on the share of the frame, not on its size in tokens.
    """
    turns = torch.arange(1, harmonics + 1, device=device)
    across, down = (2 * math.pi * (torch.arange(n, device=device) + 0.5) / n for n in (cols, rows))
    x, y = (torch.cat([(a[:, None] * turns).sin(), (a[:, None] * turns).cos()], -1) for a in (across, down))
    return torch.cat([x.repeat(rows, 1), y.repeat_interleave(cols, 0)], -1)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the whole last dimension (all heads together), computed in at least float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


def layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Layer norm in at least float32, result in x's dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    weight, bias = (None if p is None else p.to(wide.dtype) for p in (weight, bias))
    return F.layer_norm(wide, x.shape[-1:], weight, bias, eps).to(x.dtype)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm of x, times (1 + scale) plus shift per group: x [B, L, C], shift and scale [B, G, C], L a multiple of
    G. With one group in all, scale and shift are the norm's own affine part: one call."""
    if shift.shape[:2] == (1, 1):
        return layer_norm(x, eps, 1 + scale[0, 0], shift[0, 0])
    wide = layer_norm(x, eps).unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift[:, :, None], wide, 1 + scale[:, :, None]).flatten(1, 2)


def add_gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + update * gate per group."""
    groups = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, groups), update.unflatten(1, groups), gate[:, :, None]).flatten(1, 2)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form.

    x / 2 (1 + tanh u) = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3): torch's sigmoid takes half as long as
    its tanh form on a CPU. In place, so only where no gradient is wanted.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or torch.is_grad_enabled():
        return F.gelu(x, approximate="tanh")
    twice_u = x.square().mul_(_GELU * 0.044715).add_(_GELU).mul_(x)
    return twice_u.sigmoid_().mul_(x)


class WideLayerNorm(nn.LayerNorm):
    """Layer norm computed in at least float32."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.eps, self.weight, self.bias)


class PatchEmbedding(nn.Conv3d):
    """A convolution whose patches do not overlap, as one matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, dim, F, rows, cols], frame by frame."""
        _, ph, pw = self.kernel_size
        patches = rearrange(x, "b c f (r p) (s q) -> b f r s (c p q)", p=ph, q=pw)
        return F.linear(patches, self.weight.flatten(1), self.bias).movedim(-1, 1)


class Mlp(nn.Module):
    """Linear, GELU (tanh), Linear, with diffusers' names."""

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(gelu(self.linear_1(x)))


class TimeMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class GeluProjection(nn.Module):
    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        return gelu(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GeluProjection(dim, ffn_dim), nn.Identity(), nn.Linear(ffn_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ConditionEmbedder(nn.Module):
    """Timestep and text embeddings. `pooled_text` also adds the mean of the text tokens to the time embedding, which
    small models need to follow a caption; Wan has none."""

    def __init__(self, dim: int, freq_dim: int, text_dim: int, pooled_text: bool) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TimeMlp(freq_dim, dim)
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = Mlp(text_dim, dim)
        self.pooled_text_embedder = nn.Linear(text_dim, dim) if pooled_text else None

    def forward(self, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """timestep [B, G], text [B, T, text_dim] -> embedding [B, G, dim], modulation [B, G, 6, dim]."""
        dtype = self.time_embedder.linear_1.weight.dtype
        if not dtype.is_floating_point:  # quantized weights compute in the type of what comes in
            dtype = text.dtype
        embedding = self.time_embedder(timestep_sinusoid(timestep, self.freq_dim).to(dtype))
        if self.pooled_text_embedder is not None:
            used = (text != 0).any(-1, keepdim=True)
            pooled = (text * used).sum(1) / used.sum(1).clamp(min=1)
            embedding = embedding + self.pooled_text_embedder(pooled)[:, None]
        return embedding, self.time_proj(F.silu(embedding)).unflatten(-1, (6, -1))


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

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def queries(self, x: Tensor) -> Tensor:
        return self._heads(self.norm_q(self.to_q(x)))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.norm_k(self.to_k(x))), self._heads(self.to_v(x))

    def output(self, x: Tensor) -> Tensor:
        return self.to_out[0](x.flatten(2))


class CausalWanBlock(nn.Module):
    def __init__(
        self, dim: int, ffn_dim: int, heads: int, cross_attn_norm: bool, eps: float, selector_tokens: int | None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.selector = BlockSelector(heads, selector_tokens, dim // heads) if selector_tokens else None
        self.attn1 = Attention(dim, heads, eps)
        self.attn2 = Attention(dim, heads, eps)
        self.norm2 = WideLayerNorm(dim, eps) if cross_attn_norm else None
        self.ffn = FeedForward(dim, ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Tensor | None,
        rotary: Rotary,
        policy: AttentionPolicy,
        layer: int,
        text_keys_values: TextKeysValues | None = None,
    ) -> Tensor:
        """x [B, L, C], modulation [B, G, 6, C], embedded text [B, T, C] -> [B, L, C]; no text is needed where
        `text_keys_values` has what this layer made of it."""
        table = (self.scale_shift_table[:, None] + modulation).to(x.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(2)

        h = modulated_norm(x, shift1, scale1, self.eps)
        query = apply_rotary(self.attn1.queries(h), rotary)
        key, value = self.attn1.keys_values(h)
        attended = policy.attend(layer, query, apply_rotary(key, rotary), value)
        x = add_gated(x, self.attn1.output(attended), gate1)

        h = x if self.norm2 is None else self.norm2(x)
        x = x + self.attn2.output(
            dense_attention(self.attn2.queries(h), *self._read_text(text, text_keys_values, layer))
        )

        h = modulated_norm(x, shift2, scale2, self.eps)
        return add_gated(x, self.ffn(h), gate2)

    def _read_text(self, text: Tensor | None, kept: TextKeysValues | None, layer: int) -> tuple[Tensor, Tensor]:
        """Cross-attention keys and values of embedded text [B, T, C], kept for later passes if there is room."""
        if kept is not None and layer in kept:
            return kept[layer]
        assert text is not None, "no text, and no keys and values of it"
        keys_values = self.attn2.keys_values(text)
        if kept is not None:
            kept[layer] = keys_values
        return keys_values


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
    """

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
    ) -> None:
        super().__init__()
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
            CausalWanBlock(dim, ffn_dim, num_attention_heads, cross_attn_norm, eps, selector_tokens)
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
            text_keys_values: those of an earlier pass over the same text, or an empty dict to keep them in.
            clean_hidden_states: [B, C, G, H, W] clean latents that precede the noisy ones in the token sequence
                (teacher forcing); the policy must then cover G + F frames.
            clean_timestep: [B] or [B, G] of the clean part; 0 when None.
            attention_kwargs: as diffusers' pipelines pass them; all of them must be empty.
            return_dict: return what diffusers' transformers do, a tuple (False) or an output object (True).

        Returns:
            [B, out_channels, F, H, W] flow of the noisy part.
        """
        if attention_kwargs:
            raise ConfigError(f"attention_kwargs: none are known, got {', '.join(attention_kwargs)}")
        frames, height, width = hidden_states.shape[2:]
        x, timestep = hidden_states, self._grouped(timestep, frames)
        clean_frames = 0
        if clean_hidden_states is not None:
            clean_frames = clean_hidden_states.shape[2]
            clean = timestep.new_zeros(len(x), 1) if clean_timestep is None else clean_timestep
            timestep = torch.cat([self._grouped(clean, clean_frames, expand=True), timestep.expand(-1, frames)], 1)
            x = torch.cat([clean_hidden_states, x], 2)
        sigma = timestep[:, None, :, None, None] / 1000

        _, ph, pw = self.config.patch_size
        rows, cols = height // ph, width // pw
        tokens = self._embed_patches(self._scale_input(x, sigma))
        embedding, modulation = self.condition_embedder(timestep, encoder_hidden_states)
        attention: AttentionPolicy = policy or ParallelAttention(x.shape[2])
        table_dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        rotary = attention.rotary(rows, cols, self.config.attention_head_dim, table_dtype, tokens.device)
        text = None if text_keys_values else self.condition_embedder.text_embedder(encoder_hidden_states)
        tokens = self._run_blocks(tokens, modulation, text, rotary, attention, text_keys_values)

        if clean_frames:
            tokens = tokens[:, clean_frames * rows * cols :]
            embedding, sigma = embedding[:, clean_frames:], sigma[:, :, clean_frames:]
        shift, scale = (self.scale_shift_table[:, None] + embedding[:, :, None]).to(tokens.dtype).unbind(2)
        tokens = self.proj_out(modulated_norm(tokens, shift, scale, self.config.eps))
        out = rearrange(tokens, "b (f r c) (p q ch) -> b ch f (r p) (c q)", f=frames, r=rows, c=cols, p=ph, q=pw)
        flow = self._to_flow(out, hidden_states, sigma)
        if return_dict is None:
            return flow
        return Transformer2DModelOutput(sample=flow) if return_dict else (flow,)

    def _run_blocks(
        self, tokens: Tensor, modulation: Tensor, text: Tensor | None, rotary: Rotary, attention: AttentionPolicy,
        kept: TextKeysValues | None,
    ) -> Tensor:  # fmt: skip
        """All blocks over frame-major tokens [B, L, C]; inside, tokens lie in the order the policy asks for."""
        order = attention.order
        if order is not None:
            if modulation.shape[1] > 1:
                raise ConfigError("timestep: tile order needs one timestep per sample and pass, got one per frame")
            order = order.to(tokens.device)
            tokens, rotary = tokens[:, order], rotary.permute(order)
        for layer, block in enumerate(self.blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(
                    block, tokens, modulation, text, rotary, attention, layer, kept, use_reentrant=False
                )
            else:
                tokens = block(tokens, modulation, text, rotary, attention, layer, kept)
        return tokens if order is None else tokens[:, order.argsort()]

    @staticmethod
    def _grouped(timestep: Tensor, frames: int, expand: bool = False) -> Tensor:
        """[B] -> [B, 1]; [B, F] stays; anything else is an error."""
        timestep = timestep[:, None] if timestep.ndim == 1 else timestep
        if timestep.ndim != 2 or timestep.shape[1] not in (1, frames):
            raise ConfigError(f"timestep: expected [B] or [B, {frames}], got {list(timestep.shape)}")
        return timestep.expand(-1, frames) if expand else timestep

    def _embed_patches(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> tokens [B, F*R*C, dim]."""
        _, ph, pw = self.config.patch_size
        tokens = self.patch_embedding(x).flatten(2).transpose(1, 2)
        if self.position_embedder is None:
            return tokens
        waves = frame_position_waves(x.shape[3] // ph, x.shape[4] // pw, self.config.position_harmonics, x.device)
        position = self.position_embedder(waves.to(self.position_embedder.weight.dtype)).to(tokens.dtype)
        return tokens + position.repeat(x.shape[2], 1)

    def _variance(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(std per channel, variance of x_t): shapes [C, 1, 1, 1] and [B, C, F or 1, 1, 1]."""
        std = torch.tensor(self.config.latent_std, dtype=sigma.dtype, device=sigma.device)[:, None, None, None]
        return std, ((1 - sigma) * std) ** 2 + sigma**2

    def _scale_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        if self.config.latent_std is None:
            return x
        return (x * self._variance(sigma)[1].rsqrt()).to(x.dtype)

    def _to_flow(self, out: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Network output -> flow. With D the variance of x_t and s the std of x0, x0 = c_skip x_t + c_out F with
        c_skip = (1-t) s^2 / D and c_out = t s / sqrt(D) gives v = (x_t - x0) / t without the division."""
        if self.config.latent_std is None:
            return out
        std, variance = self._variance(sigma)
        out, x_wide = (z.to(variance.dtype) for z in (out, x))
        return ((sigma - (1 - sigma) * std**2) / variance * x_wide - std * variance.rsqrt() * out).to(x.dtype)
