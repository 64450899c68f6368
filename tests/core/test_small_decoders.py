"""Decoders for small GPUs: a TAEHV file in place of Wan's decoder, and Wan's own in tiles; both as a stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor, nn

from sparse_forcing.cli import main
from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.model.small.tiny_decoder import TinyDecoder
from sparse_forcing.model.vae import WanAutoencoder
from sparse_forcing.sampling.generation import preflight
from sparse_forcing.sampling.generation.jobs import GenerateConfig
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from tests.taehv_file import WIDTHS, published
from tests.wan_folder import VIDEO


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "taew2_1.safetensors"
    save_file(published(), path)
    return path


def naive(state: dict[str, Tensor], latents: Tensor) -> Tensor:
    """Frame by frame in time and layer by layer, for one video: [F, C, h, w] -> [4 F - 3, 3, 8 h, 8 w] in [-1, 1]."""
    frames = [torch.tanh(z / 3) * 3 for z in latents[:, None]]

    def conv(x: Tensor, name: str, padding: int = 1) -> Tensor:
        return nn.functional.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), padding=padding)

    frames = [conv(x, "decoder.1").relu() for x in frames]
    for start in WIDTHS:
        for block in range(start, start + 3):
            new = []
            for number, x in enumerate(frames):
                past = frames[number - 1] if number else torch.zeros_like(x)
                y = torch.cat([x, past], 1)
                for layer in (0, 2, 4):
                    y = conv(y, f"decoder.{block}.conv.{layer}")
                    y = y.relu() if layer < 4 else y
                new.append((y + x).relu())
            frames = new
        frames = [nn.functional.interpolate(x, scale_factor=2.0) for x in frames]
        width = frames[0].shape[1]
        frames = [part for x in frames for part in conv(x, f"decoder.{start + 4}.conv", 0).split(width, 1)]
        frames = [conv(x, f"decoder.{start + 5}") for x in frames]
    return torch.cat([conv(x.relu(), "decoder.22") for x in frames])[3:].clamp(0, 1) * 2 - 1


def test_a_tiny_decoder_is_the_published_network_and_streams_bit_by_bit(file: Path) -> None:
    tiny, latents = TinyDecoder.from_file(file), torch.randn(2, 16, 5, 3, 4)
    (whole,) = tiny.decode_stream([latents])
    assert whole.shape == (2, 3, 17, 24, 32)
    for video, z in zip(whole, latents):
        torch.testing.assert_close(video.transpose(0, 1), naive(published(), z.transpose(0, 1)), atol=2e-5, rtol=1e-4)
    assert 0.05 < whole.std() < 0.9
    for sizes in ([2, 3], [1, 1, 3]):
        assert torch.cat(list(tiny.decode_stream(latents.split(sizes, 2))), 2).equal(whole)
    assert resumed(tiny, latents, 2).equal(whole)


def resumed(decoder: Any, latents: Tensor, after: int) -> Tensor:
    """Decoded by two streams: what the first one carried away is all that the second one knows of it."""
    carried: list[Any] = []
    begun = list(decoder.decode_stream([latents[:, :, :after]], carried))
    copied = [x.clone() if isinstance(x, Tensor) else x for x in carried]
    return torch.cat([*begun, *decoder.decode_stream([latents[:, :, after:]], copied)], 2)


def test_files_are_read_strictly(file: Path, tmp_path: Path) -> None:
    state = published()

    def refused(match: str, path: str = "bad.pth", **changes: Any) -> None:
        torch.save({name: x for name, x in (state | changes).items() if x is not None}, tmp_path / path)
        with pytest.raises(WeightsError, match=match):
            TinyDecoder.from_file(tmp_path / path)

    refused(r"missing.*decoder\.9\.conv\.2\.bias", **{"decoder.9.conv.2.bias": None})
    refused(r"decoder\.6\.weight", **{"decoder.6.weight": torch.zeros(3)})
    refused("decodes latents of 48 channels", **{"decoder.1.weight": torch.zeros(256, 48, 3, 3)})
    refused(r"decoder\.22\.bias holds NaN", **{"decoder.22.bias": torch.full((3,), torch.nan)})
    refused("not a TAEHV file", **{"decoder.1.weight": None})
    torch.save(published(first_growth=2), tmp_path / "twice.pth")  # as it was trained: the last half counts
    twice = TinyDecoder.from_file(tmp_path / "twice.pth").state_dict()["decoder.7.conv.weight"]
    assert twice.equal(published(first_growth=2)["decoder.7.conv.weight"][256:])
    with pytest.raises(WeightsError, match="no such file"):
        TinyDecoder.from_file(tmp_path / "nothing.pth")


def test_videos_are_decoded_by_the_tiny_one(wan: Path, file: Path, tmp_path: Path, capsys: Any) -> None:
    pipe = SparseForcingPipeline.from_pretrained(str(wan))
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {**VIDEO, "num_inference_steps": 1, "guidance_scale": 1.0}
    latents = pipe("a cat", output_type="latent", generator=torch.Generator().manual_seed(0), **options).frames
    pipe.use_tiny_decoder(file)
    pipe = pipe.with_defaults(pipe.defaults)
    frames = pipe("a cat", generator=torch.Generator().manual_seed(0), **options).frames
    (expected,) = TinyDecoder.from_file(file).decode_stream([latents.transpose(1, 2)])
    np.testing.assert_allclose(frames, (expected.permute(0, 2, 3, 4, 1) + 1) / 2, atol=1e-6)
    assert pipe.autoencoder.encode(torch.zeros(1, 3, 1, 32, 32)).shape == (1, 16, 1, 4, 4)  # by Wan's own
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    target = tmp_path / "a.mp4"
    assert (
        main(["generate", "a cat", "--model", str(wan), "--tiny-vae", str(file), "--output", str(target), *words]) == 0
    )
    assert json.loads(target.with_suffix(".json").read_text())["settings"]["tiny_vae"] == str(file)
    for flags, message in (
        (["--model", str(wan), "--tiny-vae", str(tmp_path / "none.pth")], "no such file"),
        (["--tiny-vae", str(file)], "--tiny-vae is for Wan's autoencoder"),
        (["--tiled-decoding"], "--tiled-decoding is for Wan's autoencoder"),
        (["--model", str(wan), "--tiny-vae", str(file), "--tiled-decoding"], "not both"),
    ):
        assert main(["generate", "a cat", *flags, "--output", str(tmp_path / "b.mp4")]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="an autoencoder of its own"):
        SparseForcingPipeline.from_pretrained("tiny").use_tiny_decoder(file)


def small_wan() -> WanAutoencoder:
    torch.manual_seed(0)
    return WanAutoencoder(AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, z_dim=16))


@torch.no_grad()
def test_tiles_are_diffusers_own_and_stream_bit_by_bit() -> None:
    model, latents = small_wan(), torch.randn(1, 16, 3, 10, 12)
    whole = model.decode(latents)
    size = {"tile_sample_min_height": 48, "tile_sample_min_width": 48, "tile_sample_stride_height": 32}
    model.vae.enable_tiling(**size, tile_sample_stride_width=40)
    tiled = model.decode(latents)
    assert 0 < (tiled - whole).abs().mean() < 0.05
    theirs = model.vae.decode(latents / model.inverse_std + model.mean).sample
    assert tiled.equal(theirs)
    for sizes in ([1, 2], [2, 1]):
        assert torch.cat(list(model.decode_stream(latents.split(sizes, 2))), 2).equal(tiled)
    assert resumed(model, latents, 1).equal(tiled)
    small = torch.randn(1, 16, 2, 5, 6)  # not more than a tile
    assert model.decode(small).equal(small_wan().decode(small))


def test_what_small_decoders_need_is_counted() -> None:
    config = GenerateConfig(model="wan-1.3b", preset="self-forcing", device="cuda")
    model = preflight.outline(config)

    def decoding(**changes: Any) -> tuple[int, int]:
        need = preflight.needs(GenerateConfig(**{**vars(config), **changes}), model)
        return need.decoding, need.autoencoder

    whole, tiled, tiny = decoding(), decoding(tiled_decoding=True), decoding(tiny_vae=Path("taew2_1.pth"))
    assert tiled[0] < whole[0] / 4 > tiny[0]
    assert tiny[1] - whole[1] == 2 * sum(x.numel() for x in TinyDecoder().parameters())
    assert decoding() == whole
    assert preflight.remedies(config, model, 8 * preflight.GIB).index("--tiled-decoding") > 0
