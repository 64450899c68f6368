"""Model folders without hashes: what does not fit its config is refused before anything is generated from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_forcing.cli import main
from sparse_forcing.errors import WeightsError
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.model.text import PAD, UMT5TextEncoder, WordTextEncoder
from sparse_forcing.model.transformer import CausalWanTransformer3DModel
from sparse_forcing.model.vae import PatchAutoencoder
from sparse_forcing.model_folder.folder import PipelineConfig
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.weights.manifest import MANIFEST

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    transformer = CausalWanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=8,
        num_layers=2,
        chunk_frames=2,
        horizon_frames=4,
    )
    text = WordTextEncoder(["a", "ball"], dim=8, num_layers=1, num_heads=2, text_len=4)
    config = PipelineConfig(
        height=16, width=16, num_frames=8, text_encoder="words", vae="patch", memory=MemoryConfig(kind="full")
    )
    SparseForcingPipeline(transformer, text, PatchAutoencoder(4), config).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / MANIFEST).unlink()
    return tmp_path / "model"


def test_sound_folder_without_hashes_loads(model: Path) -> None:
    assert SparseForcingPipeline.from_pretrained(str(model)).geometry.chunk_frames == 2


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("transformer", {"blocks.1.attn1.to_q.weight": None}, r"missing: blocks\.1\.attn1\.to_q\.weight"),
        ("transformer", {"blocks.2.extra": torch.zeros(1)}, "unexpected: blocks.2.extra"),
        ("transformer", {"proj_out.bias": torch.zeros(5)}, r"wrong shape: proj_out.bias \[5\]"),
        ("transformer", {"proj_out.bias": torch.zeros(4, dtype=torch.int32)}, "not floating point: proj_out.bias"),
        ("vae", {"basis": None}, "missing: basis"),
        ("text_encoder", {"norm.bias": None}, r"missing: norm\.bias"),
    ],
)
def test_other_tensors_than_the_models_are_named(
    model: Path, part: str, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    tensors = load_file(model / part / WEIGHTS) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, model / part / WEIGHTS)
    with pytest.raises(WeightsError, match=f"{part}: does not fit the model; {message}"):
        SparseForcingPipeline.from_pretrained(str(model))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("transformer", {"num_layers": 1}, "unexpected: blocks.1"),
        ("transformer", {"num_layers": 3}, "missing: blocks.2"),
        ("transformer", {"num_layers": "x"}, "num_layers must be a whole number"),
        ("transformer", {"patch_size": [1]}, "cannot be loaded"),
        ("transformer", {"num_attention_heads": 0}, "must be a whole number from 1"),
        ("transformer", {"chunk_frames": "x"}, "config.json: chunk_frames must be a whole number"),
        ("text_encoder", {"words": 5}, "cannot be loaded"),
    ],
)
def test_config_that_does_not_describe_the_weights_is_one_line(
    model: Path, part: str, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    output = model.with_name("out.mp4")
    assert main(["generate", "a ball", "--model", str(model), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_text_encoder_is_not_completed_with_random_weights(tmp_path: Path) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(tmp_path / "text_encoder")
    tensors = load_file(tmp_path / "text_encoder" / "model.safetensors")
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, tmp_path / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"missing: encoder\.final_layer_norm\.weight"):
        UMT5TextEncoder.from_pretrained(tmp_path)


def test_words_see_their_neighbours_but_no_padding() -> None:
    torch.manual_seed(0)
    text = WordTextEncoder(
        ["a", "ball", "red", "the"], dim=8, num_layers=2, num_heads=2, text_len=6, neighbours=3
    ).eval()
    short, long = text.encode(["a red ball", "the red ball a red ball"])
    assert not short[3:].any()
    with torch.no_grad():
        text.token_embedding.weight[PAD] += 1
        text.position_embedding[3:] += 1
    torch.testing.assert_close(text.encode(["a red ball"])[0], short)
    assert (text.encode(["the red ball a red ball"])[0] - long).abs().max() > 1e-3
    without = WordTextEncoder(["a", "ball", "red", "the"], dim=8, num_layers=2, num_heads=2, text_len=6).eval()
    without.load_state_dict({name: x for name, x in text.state_dict().items() if not name.startswith("convolutions.")})
    assert (without.encode(["a red ball"])[0] - short)[:3].abs().amin(1).min() > 0
    for convolution in text.convolutions:
        torch.nn.init.zeros_(convolution.weight)
        torch.nn.init.zeros_(convolution.bias)
    torch.testing.assert_close(
        without.encode(["the red ball a red ball"])[0], text.encode(["the red ball a red ball"])[0]
    )
    assert (long - text.encode(["the red ball a red ball"])[0]).abs().max() > 1e-3
