"""The embedded model's learned autoencoder: shapes, streaming, normalised latents, refusals, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparse_forcing.errors import ConfigError
from sparse_forcing.model.vae import CLIPS_AT_ONCE, PatchAutoencoder, TokenAutoencoder


def small() -> TokenAutoencoder:
    torch.manual_seed(0)
    vae = TokenAutoencoder(6, components=12, dim=16, num_blocks=1)
    vae.patches.fit(torch.rand(8, 3, 4, 16, 16) * 2 - 1)
    return vae.eval()


@pytest.mark.parametrize(("frames", "height", "width"), [(4, 8, 8), (12, 16, 40)])
def test_latents_have_one_vector_for_each_patch_of_space_and_time(frames: int, height: int, width: int) -> None:
    vae = small()
    pixels = torch.rand(2, 3, frames, height, width) * 2 - 1
    latents = vae.encode(pixels)
    assert latents.shape == (2, 6, frames // 4, height // 8, width // 8)
    decoded = vae.decode(latents)
    assert decoded.shape == pixels.shape
    assert decoded.abs().max() <= 1


def test_streaming_equals_decoding_the_whole() -> None:
    vae = small()
    latents = torch.randn(2, 6, 5, 2, 3)
    streamed = torch.cat(list(vae.decode_stream(latents.split([2, 1, 2], 2))), 2)
    torch.testing.assert_close(streamed, vae.decode(latents))


def test_a_latent_frame_does_not_depend_on_the_others() -> None:
    vae = small()
    pixels = torch.rand(1, 3, 12, 16, 16) * 2 - 1
    torch.testing.assert_close(vae.encode(pixels)[:, :, 1:2], vae.encode(pixels[:, :, 4:8]))


def test_sizes_that_patches_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="W = 12 is not a multiple of 8"):
        small().encode(torch.zeros(1, 3, 4, 16, 12))


def test_it_loads_as_it_was_saved(tmp_path: Path) -> None:
    vae = small()
    vae.save_pretrained(tmp_path)
    again = TokenAutoencoder.from_pretrained(tmp_path).eval()
    pixels = torch.rand(1, 3, 4, 16, 16)
    assert torch.equal(again.encode(pixels), vae.encode(pixels))


def test_patches_fitted_in_pieces_have_the_components_of_all_clips() -> None:
    torch.manual_seed(0)
    pixels = torch.rand(2 * CLIPS_AT_ONCE + 3, 3, 4, 8, 16) * torch.linspace(0.2, 1, 16)
    patches = PatchAutoencoder(5)
    std = patches.fit(pixels)
    flat = patches._to_patches(pixels).flatten(0, 3).double()
    expected = torch.linalg.eigvalsh(torch.cov(flat.T, correction=0)).flip(0)[:5].sqrt().sqrt()
    torch.testing.assert_close(torch.tensor(std).double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(patches.mean, flat.mean(0).float())
    projected = (flat - flat.mean(0)) @ patches.basis.T.double()
    torch.testing.assert_close(projected.std(0, correction=0).sqrt(), expected, rtol=1e-5, atol=0)
