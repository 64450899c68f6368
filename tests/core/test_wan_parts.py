"""Wan's text encoder behind this project's interface, on a tiny random umT5 (its autoencoder: tests/golden)."""

from __future__ import annotations

import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel

from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.model.text import UMT5TextEncoder, clean_prompt
from sparse_forcing.model.vae import WanAutoencoder


class CharacterTokenizer:
    """Stands in for a tokenizer of transformers: one id per character, 1 at the end, 0 for padding."""

    def __call__(self, prompts: list[str], *, max_length: int, **_: object) -> dict[str, torch.Tensor]:
        rows = [[*(3 + ord(c) % 90 for c in prompt[: max_length - 1]), 1] for prompt in prompts]
        ids = torch.tensor([row + [0] * (max_length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.fixture(scope="module")
def encoder() -> UMT5TextEncoder:
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=100, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    return UMT5TextEncoder(UMT5EncoderModel(config), CharacterTokenizer(), text_len=12)


def test_padding_is_exactly_zero_and_does_not_leak(encoder: UMT5TextEncoder) -> None:
    both, alone = encoder.encode(["red ball", "a"]), encoder.encode(["a"])
    assert both.shape == (2, 12, 16)
    assert both[1, 2:].abs().max() == 0
    assert both[1, :2].abs().min() > 0
    torch.testing.assert_close(both[1:], alone)


def test_long_prompts_are_cut_and_the_empty_one_is_a_token(encoder: UMT5TextEncoder) -> None:
    assert (encoder.encode(["x" * 100]).abs().sum(-1) > 0).all()
    assert (encoder.encode([""]).abs().sum(-1) > 0).sum() == 1


def test_encoder_is_frozen(encoder: UMT5TextEncoder) -> None:
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.encode(["a"]).requires_grad


def test_prompts_are_cleaned_as_wan_does() -> None:
    assert clean_prompt("  a &amp;amp; b\n\tc  ") == "a & b c"


def test_missing_folders_are_one_line(tmp_path) -> None:
    for load in (UMT5TextEncoder.from_pretrained, WanAutoencoder.from_pretrained):
        with pytest.raises(WeightsError, match=str(tmp_path)) as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)


def test_pixel_frames_that_do_not_fit_are_refused() -> None:
    from diffusers import AutoencoderKLWan

    vae = WanAutoencoder(AutoencoderKLWan(base_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1))
    with pytest.raises(ConfigError, match="17 for example"):
        vae.encode(torch.zeros(1, 3, 18, 16, 16))
