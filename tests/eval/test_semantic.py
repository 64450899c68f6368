"""Stand-ins from folders of transformers weights (tiny and random here), and that their numbers never make a total."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.evaluate import EvaluateConfig, evaluate
from sparse_forcing.eval.results import load_results
from sparse_forcing.eval.vbench.semantic import load_stand_in
from sparse_forcing.media.video import write_video
from tests.eval.conftest import moving_disc

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SQUARE = {"height": 64, "width": 64}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import (
        CLIPTokenizer,
        OwlViTConfig,
        OwlViTForObjectDetection,
        OwlViTImageProcessor,
        OwlViTProcessor,
    )

    folder = tmp_path_factory.mktemp("detector")
    symbols = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    text = {**SIZES, "vocab_size": len(symbols), "max_position_embeddings": 16, "bos_token_id": 52, "eos_token_id": 53}
    vision = {**SIZES, "image_size": 64, "patch_size": 16}
    OwlViTForObjectDetection(OwlViTConfig(text_config=text, vision_config=vision, projection_dim=32)).save_pretrained(
        folder
    )
    images = OwlViTImageProcessor(size=SQUARE, crop_size=SQUARE)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[])
    OwlViTProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    folder = tmp_path_factory.mktemp("captioner")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "alley", "night", *LETTERS]
    vocabulary = {word: number for number, word in enumerate(words)}
    ids = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {**SIZES, **ids, "vocab_size": len(words), "encoder_hidden_size": 32, "max_position_embeddings": 64}
    vision = {**SIZES, "image_size": 64, "patch_size": 16}
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    tokenizer = BertTokenizer(vocab=vocabulary)
    BlipProcessor(image_processor=BlipImageProcessor(size=SQUARE), tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_a_detector_finds_labels_in_every_frame(detector: Path) -> None:
    stand_in = load_stand_in("detector", detector, "cpu")
    stand_in.min_score = -1.0
    frames = moving_disc(2)
    found = stand_in.detect(frames, ["cat", "red dog"])
    assert len(found) == 2
    assert {detection.label for frame in found for detection in frame} <= {"cat", "red dog"}
    assert all(0 <= detection.score <= 1 and len(detection.box) == 4 for detection in found[0])
    assert len(found[0]) == 16  # one for each patch


def test_a_captioner_writes_a_sentence_for_every_frame(captioner: Path) -> None:
    captions = load_stand_in("captioner", captioner, "cpu").caption(moving_disc(3))
    assert len(captions) == 3
    assert all(captions)


def test_stand_ins_are_marked_and_refuse_totals(detector: Path, captioner: Path, tmp_path: Path) -> None:
    for prompt in ("a bird", "alley"):
        write_video(tmp_path / "v" / f"{prompt}-0.mp4", moving_disc(16), 16)
    names = (f"detector={detector}", f"captioner={captioner}")
    metrics = ("object_class", "scene", "temporal_flickering")
    config = EvaluateConfig(target=tmp_path / "v", suite="vbench", metrics=metrics, stand_ins=names, report=False)
    assert evaluate(config) == 0
    results = load_results(config.output_folder)
    assert results["metrics"]["object_class"]["stand_in"] is True
    assert results["metrics"]["scene"]["stand_in"] is True
    assert "object_class (measured by a stand-in)" in results["totals"]["refused"]
    assert results["networks"]["detector"].startswith("stand-in")


@pytest.mark.parametrize("kind", ["detector", "captioner"])
def test_folders_that_hold_no_model_are_one_line(kind: str, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ConfigError, match=f"stand-in {kind}") as caught:
            load_stand_in(kind, folder, "cpu")
        assert "\n" not in str(caught.value)
