"""Layers around the transformer's attention: embeddings of patches, places, timesteps, text; norms, feed-forward."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_forcing.kernels.token_rows.interface import rms_norm
from sparse_forcing.model.remembered import remember

_GELU = 2 * math.sqrt(2 / math.pi)


def timestep_sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """[..., dim] = [cos | sin] of timestep * 10000^(-j / (dim/2)), computed in float64."""
    half = dim // 2
    frequencies = torch.pow(10_000.0, -torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angles = timestep.double()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


@remember
def constant_tensor(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[len(values)]"""
    return torch.tensor(values, dtype=dtype, device=device)


@remember
def frame_position_waves(rows: int, cols: int, harmonics: int, device: torch.device) -> Tensor:
    """[rows * cols, 4 * harmonics]: sines and cosines of 1, 2, ... turns across and down the frame, at token centres.

    They depend on the share of the frame, not on its size in tokens.
    """
    turns = torch.arange(1, harmonics + 1, device=device)
    across, down = (2 * math.pi * (torch.arange(n, device=device) + 0.5) / n for n in (cols, rows))
    x, y = (torch.cat([(a[:, None] * turns).sin(), (a[:, None] * turns).cos()], -1) for a in (across, down))
    return torch.cat([x.repeat(rows, 1), y.repeat_interleave(cols, 0)], -1)


class PatchEmbedding(nn.Conv3d):
    """A convolution whose patches do not overlap, as one matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, dim, F, rows, cols], frame by frame."""
        _, ph, pw = self.kernel_size
        patches = rearrange(x, "b c f (r p) (s q) -> b f r s (c p q)", p=ph, q=pw)
        return F.linear(patches, self.weight.flatten(1), self.bias).movedim(-1, 1)


def is_hooked(module: nn.Module) -> bool:
    """Whether diffusers or accelerate act when the module is called, to move its weights for example: it must be called
    then, and its weights not be read around it."""
    return hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")


class RMSNorm(nn.Module):
    """Root-mean-square norm over the whole last dimension (all heads together), computed in at least float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class WideLayerNorm(nn.LayerNorm):
    """Layer norm computed in at least float32. The block reads its weights for a step of more than this norm."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        weight, bias = (None if p is None else p.to(wide.dtype) for p in (self.weight, self.bias))
        return F.layer_norm(wide, x.shape[-1:], weight, bias, self.eps).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form.

    x / 2 (1 + tanh u) = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3): torch's sigmoid takes half as long as
    its tanh form on a CPU. In place, so only where no gradient is wanted.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or torch.is_grad_enabled():
        return F.gelu(x, approximate="tanh")
    one = constant_tensor((_GELU,), x.dtype, x.device)
    return torch.addcmul(one, x, x, value=_GELU * 0.044715).mul_(x).sigmoid_().mul_(x)


def ends_products(device: torch.device) -> bool:
    """Whether the device's matrix products end with the bias and GELU, in its tanh form, in the same launch."""
    return device.type == "cuda"


def is_plain(module: nn.Module) -> bool:
    """Whether a linear layer is nothing but its weight and bias: not quantised or adapted, no hooks, as offloading and
    sharding have."""
    plain = type(module) is nn.Linear and module.bias is not None and not parametrize.is_parametrized(module)
    return plain and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


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
        proj = self.proj
        if ends_products(x.device) and is_plain(proj) and not torch.is_grad_enabled():
            found = torch._addmm_activation(proj.bias, x.flatten(0, -2), proj.weight.t(), use_gelu=True)
            return found.unflatten(0, x.shape[:-1])
        return gelu(proj(x))


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


def scale_input(x: Tensor, sigma: Tensor, latent_std: Sequence[float] | None) -> Tensor:
    """x_t [B, C, F, H, W] at unit variance, where the standard deviation of each latent channel is known."""
    return x if latent_std is None else (x * _variance(sigma, latent_std)[1].rsqrt()).to(x.dtype)


def convert_to_flow(out: Tensor, x: Tensor, sigma: Tensor, latent_std: Sequence[float] | None) -> Tensor:
    """Network output -> flow. With D the variance of x_t and s the std of x0, x0 = c_skip x_t + c_out F with
    c_skip = (1-t) s^2 / D and c_out = t s / sqrt(D) gives v = (x_t - x0) / t without the division."""
    if latent_std is None:
        return out
    std, variance = _variance(sigma, latent_std)
    out, x_wide = (z.to(variance.dtype) for z in (out, x))
    return ((sigma - (1 - sigma) * std**2) / variance * x_wide - std * variance.rsqrt() * out).to(x.dtype)


def _variance(sigma: Tensor, latent_std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(std per channel, variance of x_t): shapes [C, 1, 1, 1] and [B, C, F or 1, 1, 1]."""
    std = constant_tensor(tuple(latent_std), sigma.dtype, sigma.device)[:, None, None, None]
    return std, ((1 - sigma) * std) ** 2 + sigma**2
