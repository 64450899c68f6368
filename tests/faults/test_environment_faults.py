"""Machines that lack triton, a GPU or optional packages, or hold a stranger's package called `kernels` (fault 28)."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from sparse_forcing.cli import main
from sparse_forcing.devices import compute_dtype, resolve_device
from sparse_forcing.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
ATTENTION = """
import torch
from sparse_forcing.kernels.block_sparse_attention import block_sparse_attention
from sparse_forcing.errors import ConfigError
q = torch.randn(1, 1, 2, 4, 8); k = torch.randn(1, 1, 3, 4, 8)
index = torch.tensor([[0, 2], [1, -1]], dtype=torch.int32)[None, None]
out = block_sparse_attention(q, k, k, index).out
reference = block_sparse_attention(q, k, k, index, backend="reference").out
assert torch.allclose(out, reference, atol=1e-5)
"""


def child(code: str, cwd: Path, *blocked: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter in which importing the `blocked` modules fails."""
    block = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", block + textwrap.dedent(code)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(cwd)} | environment,
    )


def test_without_triton_attention_runs_and_forcing_it_says_why(tmp_path: Path) -> None:
    forced = """
    try:
        block_sparse_attention(q, k, k, index, backend="triton")
    except ConfigError as error:
        assert "triton" in str(error) and "\\n" not in str(error), error
    else:
        raise AssertionError("a backend that cannot run was accepted")
    """
    done = child(ATTENTION + textwrap.dedent(forced), tmp_path, "triton")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_without_optional_packages_generation_still_imports(tmp_path: Path) -> None:
    modules = ("sampling.pipeline", "cli.generate", "eval.scene_checker.caption")
    code = f"import {', '.join(f'sparse_forcing.{module}' for module in modules)}"
    done = child(code, tmp_path, "cv2", "scipy", "matplotlib", "gradio", "triton")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_foreign_package_called_kernels_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("foreign = True")
    code = "import kernels, sparse_forcing.sampling.pipeline\nassert kernels.foreign\n" + ATTENTION
    done = child(code, tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "cpu:x", "meta"])
def test_a_device_that_is_not_there_is_an_error_not_a_fallback(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--device {name}: not usable"):
        resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_forced_gpu_without_one_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a ball", "--device", "cuda", "--output", str(tmp_path / "c.mp4")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "--device cuda: not usable" in captured.err
    assert list(tmp_path.iterdir()) == []
    assert resolve_device("auto") == "cpu"


@pytest.mark.parametrize("flag", ["--device", "--text-encoder-device"])
def test_a_device_that_is_not_there_is_named_by_its_flag(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a ball", flag, "cuda:99", "--output", str(tmp_path / "c.mp4")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert f"{flag} cuda:99: not usable" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_unknown_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a ball", "--model", str(tmp_path / "none"), "--output", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "none" in captured.err
    assert [path for path in (tmp_path / "out").rglob("*")] == []


def test_bfloat16_saves_no_time_where_torch_lacks_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.delattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", raising=False)  # as in such a build
    assert compute_dtype("auto", torch.device("cpu")) == torch.float32
    assert compute_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert compute_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
