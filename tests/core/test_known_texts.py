"""umT5 reads prompts once and goes: the same video as with it beside the model, and none for a prompt that is known."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_forcing.cli import main
from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.sampling import texts
from sparse_forcing.sampling.generation.jobs import GenerateConfig
from sparse_forcing.sampling.generation.placement import place
from sparse_forcing.sampling.generation.preflight import needs, outline
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from tests.wan_folder import VIDEO, load

SHORT: dict[str, Any] = {**VIDEO, "num_inference_steps": 1}


def run(pipe: SparseForcingPipeline, prompt: Any) -> np.ndarray:
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **SHORT).frames


def test_prompts_that_were_read_first_make_the_same_video(wan: Path) -> None:
    expected = run(load(wan), "a cat")
    early, freed = load(wan, prompts=["a dog", "a cat"]), load(wan)
    encoder = weakref.ref(freed.text_encoder)
    freed.free_text_encoder(["a cat"])
    gc.collect()
    assert encoder() is None
    for pipe in (early, freed):
        assert pipe.text_encoder is None
        np.testing.assert_array_equal(run(pipe, "a cat"), expected)
        np.testing.assert_array_equal(run(pipe.with_defaults(pipe.defaults), "a cat"), expected)
        with pytest.raises(ConfigError, match="'a red ball' was not read before the text encoder left"):
            run(pipe, "a red ball")
        pipe.to("cpu", text_encoder_device="cpu")


def test_what_saves_memory_goes_together(wan: Path) -> None:
    """Blocks or parts that are offloaded hold weights in 8 bits as well, and lose their text encoder as well."""
    expected = [run(load(wan, prompts=["a cat"], weights=weights), "a cat") for weights in (None, "int8")]
    small = load(wan, prompts=["a cat"], weights="int8")
    place(small, GenerateConfig(offload="blocks", tiled_decoding=True), "cpu", "cpu")
    np.testing.assert_array_equal(run(small, "a cat"), expected[1])
    pipe = load(wan)
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.free_text_encoder(["a cat"])
    for _ in range(2):
        np.testing.assert_array_equal(run(pipe, "a cat"), expected[0])


def test_a_prompt_is_read_once_and_alone(wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, read = load(wan), []
    forward = pipe.text_encoder.forward
    monkeypatch.setattr(pipe.text_encoder, "forward", lambda ids, used: (read.append(len(ids)), forward(ids, used))[1])
    both = pipe.encode_prompt(["a cat", "a red dog"])
    assert torch.equal(pipe.encode_prompt("a red dog"), both[1:])
    assert read == [1, 1]
    torch.testing.assert_close(both, pipe.text.encode(["a cat", "a red dog"]), atol=1e-6, rtol=1e-5)
    assert not both[0, 3:].any()
    pipe.text_encoder.to(torch.bfloat16)  # another type reads otherwise
    assert not torch.equal(pipe.encode_prompt("a cat"), both[:1])
    pipe.known_texts.limit = 2
    for prompt in ("a ball", "the cat", "the ball"):
        pipe.encode_prompt(prompt)
    assert len(pipe.known_texts._known) == 2


def test_what_is_said_of_a_prompt_is_said_whenever_it_is_used(wan: Path) -> None:
    long = "cat " * 600
    pipe = load(wan, prompts=[long])
    for _ in range(2):
        with pytest.warns(UserWarning, match="prompt cut to its first 512 tokens"):
            pipe.encode_prompt(long)


def test_a_prompt_of_an_earlier_run_needs_no_text_encoder(wan: Path, tmp_path: Path) -> None:
    folder, cache = tmp_path / "wan", tmp_path / "texts"
    shutil.copytree(wan, folder)
    expected = run(load(folder, prompts=["a cat"], prompt_cache=cache), "a cat")
    assert len(list(cache.glob("*.safetensors"))) == 2  # and the negative prompt
    asked: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "load_text_encoder", lambda where, dtype: asked.append(where))
        np.testing.assert_array_equal(run(load(folder, prompts=["a cat"], prompt_cache=cache), "a cat"), expected)
    assert not asked
    load(folder, prompts=["a dog", "a cat"], prompt_cache=cache)
    load(folder, prompts=["a cat"], prompt_cache=cache, torch_dtype=torch.bfloat16)  # is another text
    assert len(list(cache.glob("*.safetensors"))) == 5
    for name in cache.glob("*.safetensors"):
        name.write_bytes(name.read_bytes()[:40])
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        load(folder, prompts=["a cat"], prompt_cache=cache)


def test_a_cache_that_would_keep_nothing_is_refused(
    wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in ({}, {"prompts": ["a cat"], "text_encoder": torch.nn.Identity()}):
        with pytest.raises(ConfigError, match=r"prompt_cache keeps what .* give `prompts`"):
            load(wan, prompt_cache=tmp_path / "texts", **given)
    words = ["generate", "a cat", "--output", str(tmp_path / "out"), "--prompt-cache", str(tmp_path / "texts")]
    assert main(words) == 2
    assert "--prompt-cache (prompt_cache) is for umT5; tiny reads words without any delay" in capsys.readouterr().err
    assert not (tmp_path / "texts").exists()


def test_another_encoder_has_another_fingerprint(wan: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "wan"
    shutil.copytree(wan, folder)
    assert texts.fingerprint(folder) == texts.fingerprint(wan)
    path = folder / "text_encoder" / "model.safetensors"
    state = load_file(path)
    state["encoder.final_layer_norm.weight"][0] += 1
    save_file(state, path, metadata={"format": "pt"})
    assert texts.fingerprint(folder) != texts.fingerprint(wan)


def test_the_command_reads_all_its_prompts_first(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    stream = SparseForcingPipeline.stream
    monkeypatch.setattr(
        SparseForcingPipeline,
        "stream",
        lambda pipe, *a, **k: (seen.append(pipe.text_encoder), stream(pipe, *a, **k))[1],
    )
    words = ["generate", "a cat", "a dog", "--model", str(wan), "--output", str(tmp_path), "--num-inference-steps", "1"]
    size = ["--height", "32", "--width", "32", "--num-frames", "5", "--prompt-cache", str(tmp_path / "texts")]
    assert main([*words, *size]) == 0, capsys.readouterr().err
    assert seen == [None, None]
    assert len(list((tmp_path / "texts").iterdir())) == 3
    (tmp_path / "file").touch()
    assert main([*words, *size[:-1], str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


def test_lines_of_a_prompt_file_are_read_whole(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts that only one video has are read before umT5 goes, too: else they could not be used."""
    lines = [
        {"prompt": "a cat", "negative_prompt": "a blue ball", "then": [[0.5, " the dog "]]},
        {"prompt": "a dog"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["generate", "--prompt-file", str(tmp_path / "p.jsonl"), "--model", str(wan), "--output", str(tmp_path)]
    size = ["--height", "32", "--width", "32", "--num-frames", "13", "--num-inference-steps", "1"]
    assert main([*words, *size, "--chunk-frames", "1", "--guidance-scale", "3"]) == 0, capsys.readouterr().err
    assert len(list(tmp_path.glob("*.mp4"))) == 2


def test_umt5_and_the_model_are_never_held_at_once(wan: Path) -> None:
    config = GenerateConfig(model=str(wan), **VIDEO)
    need = needs(config, outline(config), "cpu")
    weights = need.transformer + need.autoencoder
    video = weights + need.cache + need.text + max(need.activations, need.decoding)
    assert need.total == need.process + max(video, need.text_encoder + need.reading, weights + need.loading)
    small = GenerateConfig(model="tiny")
    tiny = needs(small, outline(small), "cpu")
    assert tiny.total > tiny.process + (tiny.transformer + tiny.autoencoder + tiny.text_encoder + tiny.cache)
    pipe = SparseForcingPipeline.from_pretrained("tiny", prompts=["a red ball"])
    with pytest.raises(ConfigError, match="a few megabytes; it stays"):
        pipe.free_text_encoder()
