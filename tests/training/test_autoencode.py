"""Training the embedded model's autoencoder: it learns, normalises its latents, and resumes exactly."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_forcing import SparseForcingPipeline
from sparse_forcing.config import build_config
from sparse_forcing.errors import ConfigError
from sparse_forcing.model.vae import TokenAutoencoder
from sparse_forcing.model_folder.folder import EMBEDDED_MODELS
from sparse_forcing.training.data.procedural import procedural_batch
from sparse_forcing.training.recipes.embedded import autoencoder as autoencode
from sparse_forcing.training.recipes.embedded.autoencoder import (
    AutoencoderConfig,
    AutoencoderLoop,
    reconstruction_losses,
    train,
)
from sparse_forcing.training.recipes.embedded.curriculum import PretrainConfig
from sparse_forcing.training.recipes.embedded.pretrain_model import make_autoencoder
from tests.training.helpers import differences, newest, state

pytestmark = pytest.mark.xdist_group("autoencode")  # one process trains for all

CONFIG = AutoencoderConfig(
    loop=AutoencoderLoop(steps=40),
    sizes=(32, 64),
    batch_size=8,
    latent_channels=8,
    components=24,
    fit_clips=32,
    dim=32,
    num_blocks=1,
)


def clips() -> torch.Tensor:
    return procedural_batch(
        7, 0, batch_size=16, num_frames=4, size=32, two_object_fraction=0.0, caption_dropout=0.0
    ).pixels


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder")
    train(replace(CONFIG, loop=AutoencoderLoop(steps=100), learning_rate=5e-3, warmup_steps=10), folder)
    return folder


def test_it_learns_and_its_latents_have_unit_variance(run_folder: Path) -> None:
    rows = [json.loads(row) for row in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    vae = TokenAutoencoder.from_pretrained(run_folder / "pipeline" / "vae").eval()
    clips = procedural_batch(
        7,
        0,
        batch_size=64,
        num_frames=4,
        size=32,
        two_object_fraction=0.0,
        caption_dropout=0.0,
        late_start_fraction=0.8,
    )
    latents = vae.encode(clips.pixels)
    assert latents.std().item() == pytest.approx(1, abs=0.3)


def test_noise_on_the_latents_costs_quality(run_folder: Path) -> None:
    vae = TokenAutoencoder.from_pretrained(run_folder / "pipeline" / "vae").eval()
    pixels = clips()
    losses = [
        reconstruction_losses(vae, pixels, noise, torch.Generator().manual_seed(0)).total.item()
        for noise in (0.0, 1.0, 3.0)
    ]
    assert losses == sorted(losses)


def test_pretraining_takes_it_frozen(run_folder: Path) -> None:
    vae, std = make_autoencoder(PretrainConfig(autoencoder=str(run_folder / "pipeline" / "vae")))
    assert std == [1.0] * CONFIG.latent_channels
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    with pytest.raises(ConfigError, match="train it first"):
        make_autoencoder(PretrainConfig(autoencoder=str(run_folder / "nothing")))


def test_a_request_to_stop_saves_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, losses = replace(CONFIG, loop=AutoencoderLoop(steps=2)), autoencode.reconstruction_losses

    def asked(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return losses(*arguments, **options)

    monkeypatch.setattr(autoencode, "reconstruction_losses", asked)
    assert train(config, tmp_path) == 143
    assert newest(tmp_path).name == "step-00000001"
    assert not (tmp_path / "pipeline" / "vae").exists()


@pytest.mark.parametrize("extra_channels", [0, 4])
def test_killed_and_resumed_is_bitwise_equal(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra_channels: int
) -> None:
    config = replace(CONFIG, loop=AutoencoderLoop(steps=4, checkpoint_every=1))
    if extra_channels:
        config = replace(
            config, extra_channels=extra_channels, init_from=str(run_folder / "pipeline" / "vae"), object_weight=4.0
        )
    train(config, tmp_path / "whole")
    losses, calls = autoencode.reconstruction_losses, []

    def killed(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return losses(*arguments, **options)

    monkeypatch.setattr(autoencode, "reconstruction_losses", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "out")
    monkeypatch.undo()
    train(config, tmp_path / "out")
    assert differences(state(newest(tmp_path / "out")), state(newest(tmp_path / "whole"))) == []


def test_a_new_decoder_leaves_the_latents_as_they_are(run_folder: Path, tmp_path: Path) -> None:
    trained = shutil.copytree(run_folder / "pipeline" / "vae", tmp_path / "trained")
    about = json.loads((trained / "config.json").read_text())
    del about["decoder_blocks"]  # older than this setting
    (trained / "config.json").write_text(json.dumps(about))
    train(
        replace(CONFIG, init_from=str(trained), decoder_blocks=2, loop=AutoencoderLoop(steps=60), learning_rate=5e-3),
        tmp_path,
    )
    old, new = (TokenAutoencoder.from_pretrained(folder).eval() for folder in (trained, tmp_path / "pipeline" / "vae"))
    pixels = clips()
    assert torch.equal(old.encode(pixels), new.encode(pixels))
    assert len(new.decoder) == len(old.decoder) + 1
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]


@torch.no_grad()
def test_more_channels_begin_with_no_effect_and_leave_the_old_ones_as_they_were(
    run_folder: Path, tmp_path: Path
) -> None:
    config = replace(
        CONFIG,
        init_from=str(run_folder / "pipeline" / "vae"),
        extra_channels=4,
        anchor=1.0,
        object_weight=4.0,
        loop=AutoencoderLoop(steps=150),
        noise=0.1,
        warmup_steps=10,
        learning_rate=3e-3,
        shape_weights={"star": 3.0},
    )
    old = TokenAutoencoder.from_pretrained(run_folder / "pipeline" / "vae").eval()
    pixels, channels = clips(), CONFIG.latent_channels
    begun = autoencode.start(config)[0].eval()
    torch.testing.assert_close(begun.encode(pixels)[:, :channels], old.encode(pixels))
    torch.testing.assert_close(begun.decode(begun.encode(pixels)), old.decode(old.encode(pixels)))
    with torch.enable_grad():
        train(config, tmp_path)
    new = TokenAutoencoder.from_pretrained(tmp_path / "pipeline" / "vae").eval()
    latents = new.encode(pixels)
    assert latents.shape[1] == channels + 4
    assert (latents[:, :channels] - old.encode(pixels)).square().mean() < 0.1
    assert latents[:, channels:].std().item() == pytest.approx(1, abs=0.4)
    silenced = latents.clone()
    silenced[:, channels:] = 0
    weights = autoencode.object_weights(pixels, 4.0)
    drawn = (old.decode(old.encode(pixels)), new.decode(silenced), new.decode(latents))
    before, without, after = (((frames - pixels).square() * weights).mean().item() for frames in drawn)
    assert after < 0.9 * before
    assert after < 0.98 * without  # equal where the decoder does not read the new channels
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(row["loss"] > row["error"] for row in rows)
    assert rows[-1]["drift"] < 0.6  # of 2, that of unrelated latents


def test_an_anchor_pulls_the_first_channels_to_its_own(run_folder: Path) -> None:
    old, moved = (TokenAutoencoder.from_pretrained(run_folder / "pipeline" / "vae").eval() for _ in range(2))
    with torch.no_grad():
        moved.encoder[-1].bias += 0.5 * moved.normalize.running_var.sqrt()

    def losses(**options) -> autoencode.Reconstruction:
        return reconstruction_losses(moved, clips(), 0.0, torch.Generator().manual_seed(0), **options)

    alone, held = losses(), losses(anchor=old, anchor_weight=2.0)
    assert alone.drift == 0
    assert held.drift.item() == pytest.approx(0.25, rel=0.05)
    torch.testing.assert_close(held.total, alone.total + 2 * held.drift)


def test_shapes_are_drawn_as_often_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, batch = [], autoencode.procedural_batch

    def noted(*arguments, **options):
        asked.append(options.get("shape_weights"))
        return batch(*arguments, **options)

    monkeypatch.setattr(autoencode, "procedural_batch", noted)
    train(replace(CONFIG, loop=AutoencoderLoop(steps=1), shape_weights={"star": 3.0}), tmp_path)
    assert asked[-1] == {"star": 3.0}


def test_objects_count_more_and_by_their_contrast() -> None:
    pixels = torch.zeros(2, 3, 2, 64, 64)
    pixels[0, :, :, 20:30, 20:30], pixels[1, :, :, 20:30, 20:30] = 0.5, 1.0
    pale, vivid = autoencode.object_weights(pixels, 4.0)
    torch.testing.assert_close(pale, 4 * vivid)
    assert (pale[0, 0, 25, 25] / pale[0, 0, 50, 50]).item() == pytest.approx(5)
    assert (pale[0, 0, 18, 31] / pale[0, 0, 17, 31]).item() == pytest.approx(5)  # two pixels around it
    assert autoencode.object_weights(torch.zeros_like(pixels), 4.0).isfinite().all()


def test_settings_that_make_no_sense_are_refused(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        replace(CONFIG, sizes=())
    with pytest.raises(ConfigError, match="fit_clips: must lie from 1"):
        replace(CONFIG, fit_clips=0)
    with pytest.raises(ConfigError, match="decoder_blocks"):
        replace(CONFIG, decoder_blocks=0)
    with pytest.raises(ConfigError, match="extra_channels: need"):
        replace(CONFIG, extra_channels=2)
    with pytest.raises(ConfigError, match="has 1; leave the setting out"):
        autoencode.start(
            replace(CONFIG, extra_channels=2, init_from=str(run_folder / "pipeline" / "vae"), decoder_blocks=2)
        )
    with pytest.raises(ConfigError, match="must not be negative"):
        replace(CONFIG, anchor=-1.0)
    with pytest.raises(ConfigError, match="dim: must lie from 1 to 4096, got 1000000"):
        replace(CONFIG, dim=10**6)
    with pytest.raises(ConfigError, match="sizes: 36 pixels are not a multiple of 8"):
        train(replace(CONFIG, sizes=(36,)), tmp_path / "odd")
    with pytest.raises(ConfigError, match="'heart'"):
        replace(CONFIG, shape_weights={"heart": 1.0})
    with pytest.raises(ConfigError, match="train it first"):
        autoencode.start(replace(CONFIG, init_from=str(tmp_path)))


def test_an_autoencoder_that_goes_on_learning_keeps_old_latents_and_leaves_a_whole_model(tmp_path: Path) -> None:
    settings = {
        "init_from": str(EMBEDDED_MODELS / "tiny-base"),
        "encoder_learns": True,
        "anchor": 1.0,
        "worlds": {"revisit": 1},
        "world_fraction": 0.5,
        "batch_size": 4,
        "sizes": [64],
        "loop": {"steps": 2},
    }
    config = build_config(AutoencoderConfig, settings)
    assert autoencode.train(config, tmp_path) == 0
    new, old = (SparseForcingPipeline.from_pretrained(name) for name in (str(tmp_path / "pipeline"), "tiny-base"))
    assert not torch.equal(new.vae.encoder[0].weight, old.vae.encoder[0].weight.float())
    torch.testing.assert_close(new.transformer.state_dict(), old.transformer.state_dict())


def test_worlds_take_their_share_of_the_clips_and_are_not_held_to_old_latents() -> None:
    config = AutoencoderConfig(worlds={"revisit": 1}, world_fraction=0.5, batch_size=16)
    pixels = torch.zeros(16, 3, 4, 32, 32)
    places = autoencode.put_worlds(config, pixels, 3)
    drawn = pixels.flatten(1).std(1) > 0
    assert 2 < len(places) < 14
    assert drawn.nonzero().flatten().tolist() == places
    again = torch.zeros(16, 3, 4, 32, 32)
    assert autoencode.put_worlds(config, again, 3) == places
    assert torch.equal(pixels, again)
