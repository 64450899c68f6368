"""Golden vae_tiny: Wan's autoencoder behind this project's interface, whole and streamed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_forcing.errors import ConfigError
from sparse_forcing.model.vae import WanAutoencoder
from tests.golden.golden_cases import Case, assert_close

KIND = "vae_tiny"


def autoencoder(case: Case) -> WanAutoencoder:
    from diffusers import AutoencoderKLWan
    from safetensors.torch import load_file

    recorded = case.tensors
    vae = AutoencoderKLWan(
        **case.json["config"],
        latents_mean=recorded["out.latents_mean"].tolist(),
        latents_std=recorded["out.latents_std"].tolist(),
    )
    vae.load_state_dict(load_file(case._beside("weights_vae_diffusers.safetensors")))
    return WanAutoencoder(vae)


def latents_of(case: Case) -> Tensor:
    """The recorded z is what the decoder sees; the transformer's latents are normalised."""
    recorded = case.tensors
    mean, std = (recorded[f"out.latents_{name}"].view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    return (recorded["in.z"] - mean) / std


def test_decode(case: Case) -> None:
    assert_close(autoencoder(case).decode(latents_of(case)), case.tensors["out.decoded"], 1e-5)


def test_first_frame_alone(case: Case) -> None:
    vae, latents = autoencoder(case), latents_of(case)
    assert_close(vae.decode(latents[:, :, :1]), case.tensors["out.decoded_first_frame_only"], 1e-5)


def test_encode_is_normalised(case: Case) -> None:
    recorded = case.tensors
    latents = autoencoder(case).encode(recorded["in.pixels"])
    assert_close(latents, recorded["out.enc_normalized"], 1e-5)


def test_streaming_equals_the_whole(case: Case) -> None:
    vae, latents = autoencoder(case), latents_of(case)
    whole = vae.decode(latents)
    for sizes in ([1] * latents.shape[2], [latents.shape[2]], [1, latents.shape[2] - 1]):
        parts = list(vae.decode_stream(latents.split(sizes, 2)))
        assert torch.equal(torch.cat(parts, 2), whole)
        assert [part.shape[2] for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(sizes)]


def test_two_streams_at_once_do_not_mix(case: Case) -> None:
    vae, latents = autoencoder(case), latents_of(case)
    first, second = (vae.decode_stream(x.split(1, 2)) for x in (latents, -latents))
    mixed = [torch.cat(pair, 0) for pair in zip(first, second)]
    assert torch.equal(torch.cat(mixed, 2), torch.cat([vae.decode(latents), vae.decode(-latents)]))


def test_a_stream_goes_on_from_what_another_carried(case: Case) -> None:
    vae, latents = autoencoder(case), latents_of(case)
    latents = torch.cat([latents, -latents, latents], 2)
    whole, carried = vae.decode(latents).split([1, *[4] * (latents.shape[2] - 1)], 2), []
    for number, _ in enumerate(vae.decode_stream(latents[:, :, :-1].split(1, 2), carried), 1):
        rest = vae.decode_stream(latents[:, :, number:].split(1, 2), list(carried))
        assert all(torch.equal(now, then) for now, then in zip(rest, whole[number:], strict=True))


def test_encoding_in_pieces_equals_the_whole(case: Case) -> None:
    vae, pixels = autoencoder(case), case.tensors["in.pixels"]
    pixels = torch.cat([pixels, pixels[:, :, :8].flip(2)], 2)
    whole = vae.encode(pixels)
    for cuts in ([1, 4, 4], [5, 8], [pixels.shape[2]]):
        sizes = [*cuts, pixels.shape[2] - sum(cuts)] if sum(cuts) < pixels.shape[2] else cuts
        assert torch.equal(torch.cat(list(vae.encode_stream(pixels.split(sizes, 2))), 2), whole)
    with pytest.raises(ConfigError, match="a piece of 3 frames, of 1"):
        list(vae.encode_stream([pixels[:, :, :3]]))


def test_what_leads_a_decoder_in_is_all_that_counts(case: Case) -> None:
    """Latents further back than `lead_frames` change no pixel."""
    vae, latents = autoencoder(case), latents_of(case)
    long = latents[:, :, torch.arange(vae.lead_frames + 3) % latents.shape[2]]
    full = list(vae.decode_stream(long.split([vae.lead_frames + 1, 2], 2)))[1]
    lead = long[:, :, 1 : vae.lead_frames + 1]
    assert torch.equal(list(vae.decode_stream([lead, long[:, :, -2:]]))[1], full)
