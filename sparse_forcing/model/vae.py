"""Video autoencoders behind one small interface: Wan's through diffusers, a small learned one and patches for `tiny`.

Legend: pixels [B, 3, F, H, W] in [-1, 1]; latents [B, C, f, h, w], normalised to what the transformer was trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from torch import Tensor, nn

from sparse_forcing.errors import ConfigError
from sparse_forcing.model.small.tiled_decode import decode_frames, decode_tiles, is_tiled
from sparse_forcing.weights.parts import explain_read_errors, load_part

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

CLIPS_AT_ONCE = 64  # whose patches are held in float64 while components are fitted


class VideoAutoencoder(Protocol):
    """What the pipeline, the recipes and the evaluator need of an autoencoder."""

    temporal_stride: int
    spatial_stride: int
    first_frame_alone: bool
    latent_channels: int
    lead_frames: int
    """Latent frames before others that the pixels of those depend on, at most."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [B, C, f, h, w] of pixels [B, 3, F, H, W] in [-1, 1]."""
        ...

    def encode_stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Latents of each piece of a video: together they are those of the whole. Every piece fills latent frames."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] of latents [B, C, f, h, w]."""
        ...

    def decode_stream(self, chunks: Iterable[Tensor], carried: list[Any] | None = None) -> Iterator[Tensor]:
        """Decode latent chunks as they come; the concatenation equals `decode` of the whole video.

        carried: what the stream takes from one chunk to the next (tensors, text, None), up to date whenever a chunk is
            yielded; empty at the beginning of a video. A stream that begins with that of another goes on from there.
        """
        ...


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Principal components of space-time patches: linear, causal, exact to stream, fitted in seconds.

    A patch of temporal_stride x spatial_stride x spatial_stride pixels becomes `latent_channels` numbers, each divided
    by the square root of its standard deviation ("half-whitened"): large components stay larger, so that layout is
    decided at higher noise than texture.

    Args:
        latent_channels: components kept.
    """

    first_frame_alone = False
    lead_frames = 0
    _supports_group_offloading = False  # a few megabytes

    @register_to_config
    def __init__(self, latent_channels: int = 96, temporal_stride: int = 4, spatial_stride: int = 8) -> None:
        super().__init__()
        self.temporal_stride, self.spatial_stride = temporal_stride, spatial_stride
        self.latent_channels = latent_channels
        patch = 3 * temporal_stride * spatial_stride**2
        if not 0 < latent_channels <= patch:
            raise ConfigError(f"latent_channels: must be at most the {patch} numbers of a patch, got {latent_channels}")
        self.register_buffer("mean", torch.zeros(patch))
        self.register_buffer("basis", torch.eye(patch)[:latent_channels])
        self.register_buffer("scale", torch.ones(latent_channels))

    def _to_patches(self, pixels: Tensor) -> Tensor:
        s = self.spatial_stride
        return rearrange(pixels, "b c (f t) (h p) (w q) -> b f h w (c t p q)", t=self.temporal_stride, p=s, q=s)

    @torch.no_grad()
    def fit(self, pixels: Tensor) -> list[float]:
        """Fit the components to pixels [B, 3, F, H, W]; returns each latent channel's standard deviation."""

        def parts() -> Iterator[Tensor]:  # in float64 all at once they would take several times the pixels' memory
            return (
                rearrange(self._to_patches(part), "b f h w n -> (b f h w) n").double()
                for part in pixels.split(CLIPS_AT_ONCE)
            )

        total = pixels.numel() // len(self.mean)
        mean = torch.stack([part.sum(0) for part in parts()]).sum(0) / total
        covariance = mean.new_zeros(len(mean), len(mean))
        for part in parts():
            part -= mean
            covariance.addmm_(part.T, part, alpha=1 / total)
        values, vectors = torch.linalg.eigh(covariance)
        order = values.argsort(descending=True)[: self.latent_channels]
        basis, std = vectors[:, order].T, values[order].clamp(min=1e-12).sqrt()
        # An eigenvector's sign is arbitrary; fix it so that a refit on the same data gives the same latents.
        basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
        for name, value in (("mean", mean), ("basis", basis), ("scale", std.sqrt())):
            getattr(self, name).copy_(value)
        return std.sqrt().tolist()

    @apply_forward_hook
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, F, H, W] with F a multiple of temporal_stride -> [B, C, F/t, H/s, W/s]."""
        for name, size, step in zip("FHW", pixels.shape[2:], (self.temporal_stride, *[self.spatial_stride] * 2)):
            if size % step:
                raise ConfigError(f"pixels: {name} = {size} is not a multiple of {step}")
        latents = ((self._to_patches(pixels.to(self.mean.dtype)) - self.mean) @ self.basis.T) / self.scale
        return rearrange(latents, "b f h w c -> b c f h w").contiguous()

    @apply_forward_hook
    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, f, h, w] -> pixels [B, 3, f*t, h*s, w*s], clamped to [-1, 1]."""
        coded = rearrange(latents, "b c f h w -> b f h w c").to(self.basis.dtype) * self.scale
        return _to_pixels(coded @ self.basis + self.mean, self.temporal_stride, self.spatial_stride).clamp(-1, 1)

    def encode_stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        for pixels in pieces:
            yield self.encode(pixels)

    def decode_stream(self, chunks: Iterable[Tensor], carried: list[Any] | None = None) -> Iterator[Tensor]:
        for chunk in chunks:
            yield self.decode(chunk)


def _to_pixels(patches: Tensor, temporal_stride: int, spatial_stride: int) -> Tensor:
    """[B, f, h, w, 3*t*s*s] -> [B, 3, f*t, h*s, w*s]."""
    t, s = temporal_stride, spatial_stride
    return rearrange(patches, "b f h w (c t p q) -> b c (f t) (h p) (w q)", c=3, t=t, p=s, q=s)


class ConvBlock(nn.Module):
    """Depthwise 3x3 over the token grid, then an MLP on every token; residual (ConvNeXt, arXiv 2201.03545)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 4 * dim)
        self.contract = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[N, rows, cols, dim] -> the same."""
        mixed = rearrange(self.depthwise(rearrange(x, "n h w c -> n c h w")), "n c h w -> n h w c")
        return x + self.contract(nn.functional.gelu(self.expand(self.norm(mixed)), approximate="tanh"))


class TokenAutoencoder(ModelMixin, ConfigMixin):
    """A learned autoencoder on the grid of space-time patches: few numbers a token, a decoder that draws sharp edges.

    Every latent frame holds `temporal_stride` pixel frames and is coded on its own, so streaming is exact. Patches go
    through a fixed linear transform (PatchAutoencoder) and a few convolutional blocks on the token grid. Latents have
    unit variance; training adds noise to them, so that nearby latents decode to the same picture.

    Args:
        latent_channels: numbers per token.
        components: principal components of a patch that the encoder sees.
        dim, num_blocks: width and depth of encoder and decoder.
        decoder_blocks: depth of the decoder when it is another one.
    """

    first_frame_alone = False
    lead_frames = 0
    _supports_group_offloading = False  # a few megabytes

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        temporal_stride: int = 4,
        spatial_stride: int = 8,
        components: int = 192,
        dim: int = 160,
        num_blocks: int = 2,
        decoder_blocks: int | None = None,
    ) -> None:
        super().__init__()
        self.temporal_stride, self.spatial_stride = temporal_stride, spatial_stride
        self.latent_channels = latent_channels
        self.patches = PatchAutoencoder(components, temporal_stride, spatial_stride)
        self.encoder = nn.Sequential(
            nn.Linear(components, dim), *(ConvBlock(dim) for _ in range(num_blocks)), nn.Linear(dim, latent_channels)
        )
        self.normalize = nn.BatchNorm1d(latent_channels, affine=False, momentum=0.01)
        self.decoder = nn.Sequential(
            nn.Linear(latent_channels, dim),
            *(ConvBlock(dim) for _ in range(decoder_blocks or num_blocks)),
            nn.LayerNorm(dim),
            nn.Linear(dim, 3 * temporal_stride * spatial_stride**2),
        )

    @apply_forward_hook
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, F, H, W] with F a multiple of temporal_stride -> [B, C, F/t, H/s, W/s]."""
        batch = len(pixels)
        patches = rearrange(self.patches.encode(pixels), "b c f h w -> (b f) h w c")
        codes = self.encoder(patches)
        mean = self.normalize.running_mean
        assert mean is not None
        codes = self.normalize(rearrange(codes, "n h w c -> (n h w) c").to(mean.dtype)).view_as(codes)
        return rearrange(codes, "(b f) h w c -> b c f h w", b=batch).contiguous()

    @apply_forward_hook
    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, f, h, w] -> pixels [B, 3, f*t, h*s, w*s], clamped to [-1, 1]."""
        return self.draw(latents).clamp(-1, 1)

    def draw(self, latents: Tensor) -> Tensor:
        """`decode` without the clamp, for training."""
        codes = rearrange(latents, "b c f h w -> (b f) h w c").to(self.patches.basis.dtype)
        patches = rearrange(self.decoder(codes).float(), "(b f) h w n -> b f h w n", b=len(latents))
        return _to_pixels(patches, self.temporal_stride, self.spatial_stride)

    def encode_stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        for pixels in pieces:
            yield self.encode(pixels)

    def decode_stream(self, chunks: Iterable[Tensor], carried: list[Any] | None = None) -> Iterator[Tensor]:
        for chunk in chunks:
            yield self.decode(chunk)


class WanAutoencoder(nn.Module):
    """Wan's causal video autoencoder (diffusers' AutoencoderKLWan) with latents normalised per channel.

    It works frame by frame with a feature cache, so a stream needs no overlap between chunks and equals the whole.
    The first latent frame holds one pixel frame, every other one `temporal_stride`.
    """

    first_frame_alone = True
    mean: Tensor
    inverse_std: Tensor

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        if vae.config.patch_size is not None:
            raise ConfigError("autoencoder: only Wan 2.1's is supported; this one cuts pixels into patches")
        self.vae = vae.requires_grad_(False).eval()
        self.temporal_stride = vae.config.scale_factor_temporal
        self.spatial_stride = vae.config.scale_factor_spatial
        self.latent_channels = vae.config.z_dim
        # Each of its causal convolutions looks two frames back, of its own rate, which is at least that of latents.
        self.lead_frames = 2 * vae._cached_conv_counts["decoder"]
        # Wan and diffusers multiply and divide by the inverse: the other way round is not the same to the last bit.
        mean, std = (torch.tensor(values) for values in (vae.config.latents_mean, vae.config.latents_std))
        for name, values in (("mean", mean), ("inverse_std", 1 / std)):
            self.register_buffer(name, values.float().view(-1, 1, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype | None = None) -> WanAutoencoder:
        """Load a local diffusers folder (the `vae` of a Wan folder). Raises WeightsError."""
        from diffusers import AutoencoderKLWan

        with explain_read_errors(folder):
            return cls(load_part(AutoencoderKLWan, Path(folder), torch_dtype))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, 1 + t k, H, W] -> the posterior's mean, normalised, [B, C, 1 + k, H/s, W/s]."""
        extra = (pixels.shape[2] - 1) % self.temporal_stride
        if extra:
            raise ConfigError(
                f"pixels: {pixels.shape[2]} frames do not fit the autoencoder; it takes 1 + a multiple of "
                f"{self.temporal_stride}, {pixels.shape[2] - extra} for example"
            )
        return self._normalize(self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mean, pixels.dtype)

    def _normalize(self, mean: Tensor, dtype: torch.dtype) -> Tensor:
        mean = mean.float()
        return ((mean - self.mean.to(mean)) * self.inverse_std.to(mean)).to(dtype)

    @torch.no_grad()
    def encode_stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Pieces [B, 3, 1 + t k, H, W], then [B, 3, t k, H, W]: the first one begins the video."""
        cache: list[Tensor | None] = [None] * self.vae._cached_conv_counts["encoder"]
        alone = 1
        for pixels in pieces:
            self._onload()
            groups = (pixels.shape[2] - alone) // self.temporal_stride
            if alone + groups * self.temporal_stride != pixels.shape[2]:
                raise ConfigError(
                    f"pixels: a piece of {pixels.shape[2]} frames, of {alone} + a multiple of {self.temporal_stride}"
                )
            parts = pixels.to(self.vae.dtype).split([1] * alone + [self.temporal_stride] * groups, 2)
            hidden = [self.vae.encoder(part, feat_cache=cache, feat_idx=[0]) for part in parts]
            mean = self.vae.quant_conv(torch.cat(hidden, 2)).chunk(2, 1)[0]
            yield self._normalize(mean, pixels.dtype)
            alone = 0

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, f, h, w] -> pixels [B, 3, 1 + t (f - 1), h*s, w*s] in [-1, 1]."""
        return next(self.decode_stream([latents]))

    @torch.no_grad()
    def decode_stream(self, chunks: Iterable[Tensor], carried: list[Any] | None = None) -> Iterator[Tensor]:
        """Pixels of each chunk of a video that starts with the first one, or goes on from the features `carried`; in
        tiles where diffusers' `enable_tiling` was called. Streams keep their caches to themselves."""
        carried = [] if carried is None else carried
        for chunk in chunks:
            self._onload()
            wide = chunk.float()
            z = (wide / self.inverse_std.to(wide) + self.mean.to(wide)).to(self.vae.dtype)
            decode = decode_tiles if is_tiled(self.vae, z) else decode_frames
            yield decode(self.vae, z, carried).clamp(-1, 1).to(chunk.dtype)

    def _onload(self) -> None:
        """Bring an offloaded autoencoder back, as diffusers does in its `decode`, which is not called here."""
        hook: Any = getattr(self.vae, "_hf_hook", None)
        if hasattr(hook, "pre_forward"):
            hook.pre_forward(self.vae)
