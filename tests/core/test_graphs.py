"""Recorded passes: a whole rollout that replays them equals one that does not, and what cannot be recorded is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from sparse_forcing.cli import main
from sparse_forcing.errors import ConfigError
from sparse_forcing.kernels.values import checked_values
from sparse_forcing.memory import MemoryConfig, RolloutMemory
from sparse_forcing.model.flow import SamplerConfig
from sparse_forcing.sampling.graphs import check_compiler, check_cuda_graphs, keep_in_place, why_not_recorded
from sparse_forcing.sampling.noise import SeededNoise
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.sampling.rollout import rollout
from tests.memory.conftest import CHANNELS, CHUNK, COLS, ROWS, Rollout
from tests.memory.test_fixed_places import tensors

SPARSE = MemoryConfig(tile=(3, 2, 3), density=0.5, persistent_blocks=3)
CHUNKS = 8


class FxRecorder:
    """Stands in for CUDA graphs where there is no GPU: records the calls and makes them again, on the same tensors."""

    def __init__(self, memory: RolloutMemory) -> None:
        self.memory = memory
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[..., Tensor], inputs: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1
        before = [x.clone() for x in tensors(self.memory, set())]
        with checked_values(on=False):
            graph = make_fx(run)(*inputs)
        for x, old in zip(tensors(self.memory, set()), before):
            x.copy_(old)  # recording ran it, which a CUDA graph's does not

        def replay() -> Tensor:
            self.replayed += 1
            return graph(*inputs)

        return replay


@pytest.fixture(scope="module")
def run() -> Rollout:
    return Rollout()


class FailingRecorder:
    """Captures what comes after `good` recordings in vain: the host has made its calls by when that shows."""

    good = 0

    def __init__(self, memory: RolloutMemory) -> None:
        self.memory, self.recorded = memory, 0

    def __call__(self, run: Callable[..., Tensor], inputs: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1
        before = [x.clone() for x in tensors(self.memory, set())]
        run(*inputs)
        for x, old in zip(tensors(self.memory, set()), before):
            x.copy_(old)
        if self.recorded > self.good:
            raise RuntimeError("operation not permitted when stream is capturing\nSearch for it in the manual")
        return lambda: run(*inputs)


class LateFailingRecorder(FailingRecorder):
    good = 1


@torch.no_grad()
def video(
    run: Rollout,
    config: MemoryConfig,
    *,
    records: bool,
    guidance: float = 1.0,
    recorder_class: Callable[[RolloutMemory], Any] = FxRecorder,
) -> tuple[Tensor, Any]:
    """Latents of a rollout whose text changes on the way, and its recorder."""
    memory = run.make(config, horizon=6)
    recorder = recorder_class(memory) if records else None
    noise = SeededNoise(
        [torch.Generator().manual_seed(seed) for seed in (1, 2)],
        (CHANNELS, 2 * ROWS, 2 * COLS),
        torch.device("cpu"),
        torch.float64,
    )
    parts = rollout(
        run.model,
        run.text,
        [CHUNK] * CHUNKS,
        memory,
        noise,
        SamplerConfig(steps=2, guidance_scale=guidance),
        unconditional_text=0 * run.text,
        text_at=lambda index: run.text.flip(0) if index == CHUNKS - 2 else None,
        record=recorder,
    )
    return torch.cat([part.latents for part in parts], 1), recorder


@pytest.mark.parametrize(
    ("kind", "guidance"), [("sparse", 1.0), pytest.param("sparse", 3.0, marks=pytest.mark.slow), ("window", 1.0)]
)
def test_a_replayed_rollout_is_the_rollout(run: Rollout, kind: str, guidance: float) -> None:
    text = run.text.clone()
    config = SPARSE if kind == "sparse" else MemoryConfig(kind=kind)
    expected, _ = video(run, config, records=False, guidance=guidance)
    found, recorder = video(run, config, records=True, guidance=guidance)
    assert torch.equal(found, expected)
    assert recorder.recorded == 2, "one denoising pass and one clean pass"
    assert recorder.replayed >= 3 * (CHUNKS - 5)
    assert torch.equal(run.text, text), "the caller's text stays as it is"


@pytest.mark.parametrize(("recorder", "tries"), [(FailingRecorder, 1), (LateFailingRecorder, 2)])
def test_a_recording_that_fails_is_said_once_and_the_video_is_right(
    run: Rollout, recorder: type[FailingRecorder], tries: int
) -> None:
    expected, _ = video(run, SPARSE, records=False)
    with pytest.warns(UserWarning, match="no CUDA graphs") as said:
        found, failed = video(run, SPARSE, records=True, recorder_class=recorder)
    assert torch.equal(found, expected)
    assert failed.recorded == tries
    assert [str(each.message) for each in said] == [
        "no CUDA graphs: recording failed (operation not permitted when stream is capturing); passes are launched one "
        "call at a time"
    ]


def test_what_is_ruled_out_is_said_and_not_recorded(run: Rollout) -> None:
    assert why_not_recorded(run.model, run.make(SPARSE), training=False) is None
    assert "gradients" in str(why_not_recorded(run.model, run.make(SPARSE), training=True))
    assert "grows" in str(why_not_recorded(run.model, run.make(MemoryConfig(kind="full")), training=False))
    hook = run.model.blocks[0].attn1.to_q.register_forward_hook(lambda *_: None)
    assert "hooks" in str(why_not_recorded(run.model, run.make(SPARSE), training=False))
    hook.remove()
    _, recorder = video(run, MemoryConfig(kind="full"), records=True)
    assert recorder.recorded == 0


def test_an_observed_memory_is_not_recorded(run: Rollout) -> None:
    memory = run.make(SPARSE)
    memory.observe_window(lambda seen: None)
    assert memory.shapes is None


def test_graphs_need_a_gpu() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [check_cuda_graphs(cpu, None), check_cuda_graphs(cuda, None)] == [False, True]
    assert check_cuda_graphs(cuda, False) is False
    with pytest.raises(ConfigError, match="--cuda-graphs"):
        check_cuda_graphs(cpu, True)


def test_texts_are_kept_in_place_while_they_fit() -> None:
    old = [(torch.zeros(2), torch.zeros(3))]
    new = keep_in_place(old, [(torch.ones(2), torch.ones(4))])
    assert new[0][0] is old[0][0]
    assert new[0][1] is not old[0][1]
    assert new[0][0].tolist() == [1, 1]


def test_compile_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"--compile.*no-such-compiler"):
        check_compiler(torch.device("cpu"))


@pytest.mark.parametrize(("flag", "said"), [("--cuda-graphs", "no CUDA graphs"), ("--compile", "no C[+][+] compiler")])
def test_what_cannot_be_is_refused_before_any_work(
    flag: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(SparseForcingPipeline, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    code = main(["generate", "a red circle", "--device", "cpu", "--output", str(tmp_path / "out"), flag])
    message = capsys.readouterr().err
    assert code == 2
    assert re.search(said, message)
    assert message.count("\n") == 1
