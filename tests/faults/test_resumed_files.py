"""`generate --resume` goes on only where all that the video is made from has the content it had: names say nothing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_forcing.cli import main
from sparse_forcing.media.video import write_video
from sparse_forcing.sampling.generation.checkpoints import checkpoint_folder
from sparse_forcing.sampling.generation.jobs import GenerateConfig, plan
from sparse_forcing.weights.manifest import model_hash, write_manifest


def write_given(path: Path, grey: int) -> None:
    """An input of whatever kind the name says."""
    if path.suffix == ".png":
        Image.new("RGB", (32, 32), (grey,) * 3).save(path)
    elif path.suffix == ".mp4":
        write_video(path, np.full((16, 32, 32, 3), grey, np.uint8), 8)
    else:
        path.write_bytes(bytes([grey]) * 8)


@pytest.mark.parametrize("flag", ["image", "video", "tiny_vae", "texts"])
def test_a_file_replaced_under_its_name(stub, tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(index: int) -> None:
        if index == 2:
            raise KeyboardInterrupt

    given = tmp_path / {"image": "a.png", "video": "a.mp4", "tiny_vae": "a.safetensors", "texts": "a.txt"}[flag]
    write_given(given, 9)
    out = tmp_path / "c.mp4"
    words = ["generate", "a ball", "--output", str(out), "--num-frames", "32", "--checkpoint-every", "1", "--resume"]
    words += [] if flag == "texts" else [f"--{flag.replace('_', '-')}", str(given)]
    stub.on_chunk = stop
    assert main(words) == 130
    before = os.stat(given)
    write_given(given, 90)
    os.utime(given, ns=(before.st_atime_ns, before.st_mtime_ns))
    if flag == "texts":  # another encoder in the model's folder, or other embeddings in the folder of kept ones
        stub.embeddings = torch.ones(4)
    capsys.readouterr()
    made = len(stub.calls)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"the checkpoint is of another video ({flag}: " in error
    assert len(stub.calls) == made
    write_given(given, 9)
    stub.embeddings, stub.on_chunk = torch.zeros(4), lambda index: None
    assert main(words) == 0
    assert "goes on from frame 16 of 32" in capsys.readouterr().err
    assert not checkpoint_folder(plan(GenerateConfig(prompts=("a ball",), output=out))[0]).exists()


@pytest.mark.parametrize("part", ["vae/w.bin", "adapter/w.bin", "scheduler/config.json", "model_index.json"])
@pytest.mark.parametrize("manifest", [False, True])
def test_a_model_is_named_by_all_that_a_video_depends_on(tmp_path: Path, part: str, manifest: bool) -> None:
    """A folder that others published has no manifest; that of a converted one knows nothing of parts that are links."""
    model, base = tmp_path / "model", tmp_path / "base"
    for name in ("transformer/w.bin", "text_encoder/w.bin"):
        (model / name).parent.mkdir(parents=True)
        (model / name).write_text("x")
    if manifest:
        write_manifest(model)
    (base / part).parent.mkdir(parents=True)
    (base / part).write_text("x")
    link = Path(part).parts[0]
    (model / link).symlink_to(base / link)
    before = model_hash(model)
    assert model_hash(model) == before
    (base / part).write_text("y")
    assert model_hash(model) != before
