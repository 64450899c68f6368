"""Model folders whose configs are damaged, and checkpoints with odd names: one line, before a layer is built."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sparse_forcing.cli import main
from sparse_forcing.errors import WeightsError
from sparse_forcing.model_folder.keys import infer_config, select_state
from tests.wan_folder import write_wan

DAMAGES = (
    ("transformer/config.json", b'{"num_layers": "x"}'),
    ("transformer/config.json", b'{"num_layers": 1000000000}'),
    ("transformer/config.json", b"\0\0\0\x18ftypmp42"),
    ("vae/config.json", b'{"z_dim": "a"}'),
    ("vae/config.json", b'{"num_res_blocks": 100000}'),
    ("text_encoder/config.json", b"null"),
    ("text_encoder/config.json", b'{"d_model": 1e99}'),
    ("text_encoder/config.json", b'{"num_layers": 1000000000}'),
)


def test_damaged_configs_are_one_line_of_doctor(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    whole = write_wan(tmp_path / "whole")
    for number, (name, content) in enumerate(DAMAGES):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        (folder / name).write_bytes(content)
        capsys.readouterr()
        assert main(["doctor", "--model", str(folder)]) == 2, (name, content)
        (line,) = capsys.readouterr().err.splitlines()
        assert str(folder) in line
    assert "holds no text" in line or "num_layers is 1000000000" in line


def test_memory_to_fit_into_is_above_none(capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor", "--model", "wan-1.3b", "--vram", "-1"]) == 2
    assert "--vram must be above 0, got -1" in capsys.readouterr().err


def test_odd_names_of_tensors_are_named() -> None:
    with pytest.raises(WeightsError, match="names of tensors that are no text: 5"):
        select_state({5: torch.zeros(1)})
    sizes = {
        "patch_embedding.weight": (48, 16, 1, 2, 2),
        "proj_out.weight": (64, 48),
        "condition_embedder.text_embedder.linear_1.weight": (48, 32),
        "condition_embedder.time_embedder.linear_1.weight": (48, 32),
        "blocks.0.ffn.net.0.proj.weight": (64, 48),
        "blocks.1000000000.norm2.weight": (48,),
    }
    state = {name: torch.empty(size, device="meta") for name, size in sizes.items()}
    with pytest.raises(WeightsError, match="names block 1000000000, but holds 6 tensors"):
        infer_config(state, head_dim=24)
    with pytest.raises(WeightsError, match="does not fit the model"):
        infer_config({**state, "patch_embedding.weight": torch.empty(48, 16, 0, 2, 2, device="meta")}, head_dim=24)
