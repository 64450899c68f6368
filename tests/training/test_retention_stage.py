"""Training of retention heads: nothing else changes, and they come to know what is attended to later."""

from __future__ import annotations

from pathlib import Path

import torch

from sparse_forcing import SparseForcingPipeline
from sparse_forcing.config import build_config
from sparse_forcing.training.recipes.retention import RetentionConfig, train
from tests.training.helpers import losses as read_losses
from tests.training.helpers import small_config

MEMORY = {"kind": "sparse", "window_frames": 4, "tile": [2, 2, 2], "persistent_blocks": 2}


def test_only_heads_learn_and_the_result_keeps_what_they_say(tmp_path: Path, model_folder: Path) -> None:
    settings = small_config(model_folder, steps=12)
    settings["data"] = {"size": 32, "latent_frames": 12}
    settings["optimizer"] = {"learning_rate": 0.05}
    assert (
        train(build_config(RetentionConfig, {**settings, "memory": MEMORY, "query_noise": 0.9}), tmp_path / "out") == 0
    )
    before = SparseForcingPipeline.from_pretrained(str(model_folder)).transformer.state_dict()
    pipe = SparseForcingPipeline.from_pretrained(str(tmp_path / "out" / "pipeline"))
    after = pipe.transformer.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    heads = {name: weight for name, weight in after.items() if ".retention." in name}
    assert heads
    assert all(weight.abs().max() > 0 for name, weight in heads.items() if name.endswith("out"))
    assert pipe.default_memory.retention == "learned"
    source = torch.Generator().manual_seed(0)
    assert pipe("a red circle", num_frames=48, num_inference_steps=1, generator=source).frames.shape[1] == 48
    found = [row["retention_loss"] for row in read_losses(tmp_path / "out")]
    assert sum(found[-4:]) < 0.7 * sum(found[:4])
