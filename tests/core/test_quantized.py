"""Weights in 8 bits: their bytes, their error, and that nothing else of a model notices."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig
from diffusers.quantizers.quantization_config import QuantizationConfigMixin, QuantizationMethod
from torch import Tensor, nn

from sparse_forcing.cli import main
from sparse_forcing.errors import ConfigError
from sparse_forcing.model.small.quantized import STORAGES, QuantizedLinear, quantize_, stored_bytes
from sparse_forcing.sampling.generation.jobs import GenerateConfig
from sparse_forcing.sampling.generation.preflight import GIB, needs, outline, remedies
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.weights.safe_load import not_finite
from tests.wan_folder import VIDEO, load

PROMPT = "a small red circle moves right on a black background"
ERROR = {"int8": (0.02, 0.06), "fp8": (0.08, 0.25)}  # of a pass and of a video's latents; bfloat16's latents: 0.06
SHORT: dict[str, Any] = {**VIDEO, "num_inference_steps": 1}


def held(model: nn.Module) -> int:
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("storage", STORAGES)
def test_a_layer_is_as_exact_as_its_bits(storage: Any) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    linear.weight.mul_(torch.logspace(-4, 4, 48)[:, None])  # channels of very different size
    linear.weight[3] = 0
    small, x = QuantizedLinear(linear, storage), torch.randn(5, 64)
    assert held(small) == 64 * 48 + 4 * 48 + 4 * 48
    error = (small(x) - linear(x)).norm(dim=0) / linear(x).norm(dim=0)
    assert error.max() < (0.02 if storage == "int8" else 0.1)  # of every channel
    assert small(x)[:, 3].equal(linear(x)[:, 3])
    moved = copy.deepcopy(small).to(torch.bfloat16)
    assert (moved.weight.dtype, moved.scale.dtype, moved.bias.dtype) == (torch.int8, torch.float32, torch.bfloat16)
    assert moved(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(moved(x.bfloat16()).float(), small(x), rtol=0.05, atol=0.05 * float(linear(x).max()))


@torch.no_grad()
def test_scales_keep_small_weights() -> None:
    """fp8 has no numbers between 0 and 0.002: stored as they are, as layerwise casting does, small weights vanish."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 64)
    linear.weight.normal_(std=0.004)
    wanted = linear.weight.clone()
    ours = relative(QuantizedLinear(linear, "fp8").dequantize(torch.float32), wanted)
    assert ours < 0.035
    assert relative(wanted.to(torch.float8_e4m3fn).float(), wanted) > 3 * ours


@pytest.mark.parametrize("storage", STORAGES)
def test_the_embedded_model_in_8_bits(storage: str) -> None:
    """A third of its bytes (a quarter but for what is no block's), and errors that are measured."""
    whole, small = load("tiny"), load("tiny", weights=storage)
    assert held(small.transformer) == stored_bytes(whole.transformer, 4, storage) < 0.34 * held(whole.transformer)
    assert small.text_encoder.dtype == torch.float32
    c, seeded = whole.transformer.config, torch.Generator().manual_seed(0)
    x = torch.randn(1, c.in_channels, c.chunk_frames, 8, 8, generator=seeded)
    with torch.no_grad():
        made = [pipe.transformer(x, torch.tensor([500.0]), pipe.encode_prompt(PROMPT)) for pipe in (small, whole)]
    latents = [
        pipe(PROMPT, output_type="latent", num_frames=16, generator=torch.Generator().manual_seed(0)).frames
        for pipe in (small, whole)
    ]
    for (got, wanted), limit in zip((made, latents), ERROR[storage]):
        assert limit / 10 < relative(got, wanted) < limit
    with pytest.raises(ConfigError, match="save_pretrained: weights in 8 bits"):
        small.save_pretrained("nowhere")


def test_umt5_in_8_bits_reads_almost_the_same(wan: Path) -> None:
    whole, small, early = load(wan), load(wan, weights="int8"), load(wan, weights="int8", prompts=["a cat"])
    assert held(small.text_encoder) == stored_bytes(whole.text_encoder, 4, "int8")
    read = small.encode_prompt("a cat")
    assert 0 < relative(read, whole.encode_prompt("a cat")) < 0.05
    assert torch.equal(early.encode_prompt("a cat"), read)
    frames = [pipe("a cat", generator=torch.Generator().manual_seed(0), **SHORT).frames for pipe in (small, whole)]
    assert 0 < np.abs(frames[0] - frames[1]).max() < 0.1
    half = load(wan, weights="fp8", torch_dtype=torch.bfloat16)
    assert np.isfinite(half("a cat", **SHORT).frames).all()


def test_bytes_are_counted_before_anything_is_loaded(wan: Path) -> None:
    config = GenerateConfig(model=str(wan), weights="int8", dtype="bfloat16", **VIDEO)
    need, pipe = needs(config, outline(config), "cpu"), load(wan, weights="int8", torch_dtype=torch.bfloat16)
    assert need.transformer == held(pipe.transformer)
    assert need.text_encoder == held(pipe.text_encoder)
    large = GenerateConfig(model="wan-14b", preset="self-forcing", memory="sparse")
    model = outline(large)
    assert needs(replace(large, weights="int8"), model).transformer < 0.52 * needs(large, model).transformer
    assert "--weights int8" in remedies(replace(large, offload="model"), model, 24 * GIB)


def test_the_command_stores_weights_in_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    stream = SparseForcingPipeline.stream
    monkeypatch.setattr(
        SparseForcingPipeline, "stream", lambda pipe, *a, **k: (seen.append(pipe), stream(pipe, *a, **k))[1]
    )
    words = ["generate", PROMPT, "--num-frames", "8", "--num-inference-steps", "1", "--weights", "int8"]
    assert main([*words, "--output", str(tmp_path / "a.mp4")]) == 0
    assert isinstance(seen[0].transformer.blocks[0].attn1.to_q, QuantizedLinear)
    assert '"weights": "int8"' in (tmp_path / "a.json").read_text()


def test_a_librarys_quantizer_is_used_instead(wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What diffusers knows by a configuration goes to diffusers; our checks of tensors let it through."""
    seen: list[str] = []

    class Config(QuantizationConfigMixin):
        def __init__(self) -> None:
            self.quant_method = QuantizationMethod.QUANTO

        to_diff_dict = QuantizationConfigMixin.to_dict

    class Quantizer(DiffusersQuantizer):
        is_trainable = is_serializable = is_compileable = False

        def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
            seen.append(type(model).__name__)

        def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
            quantize_(model, "int8")

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "quanto", Quantizer)
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "quanto", Config)
    config = PipelineQuantizationConfig(quant_mapping={"transformer": Config()})
    pipe = load(wan, quantization_config=config)
    assert seen == ["CausalWanTransformer3DModel"]
    assert isinstance(pipe.transformer.blocks[0].ffn.net[2], QuantizedLinear)
    assert np.isfinite(pipe("a cat", **SHORT).frames).all()
    with pytest.raises(ConfigError, match="weights: quantization_config"):
        load(wan, quantization_config=config, weights="int8")


def test_what_cannot_be_stored_in_8_bits_is_said(wan: Path) -> None:
    with pytest.raises(ConfigError, match="weights: expected one of int8, fp8, got 'int4'"):
        load(wan, weights="int4")
    with pytest.raises(ConfigError, match="Linear has no blocks"):
        quantize_(nn.Linear(3, 3), "int8")


class LibraryTensor(torch.Tensor):
    """A quantization library's tensor: it can be turned back, and knows nothing else."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> LibraryTensor:
        made = torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype)
        made.inside = inside
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inside"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: Any) -> LibraryTensor:
        return LibraryTensor(parts["inside"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(str(function))

    def dequantize(self) -> Tensor:
        return self.inside


def test_a_librarys_tensors_are_checked_turned_back() -> None:
    assert not_finite({"a": LibraryTensor(torch.ones(2))}) is None
    assert not_finite({"a": torch.ones(2), "b": LibraryTensor(torch.tensor([1.0, float("nan")]))}) == "b"
