"""bench attention: it times nothing that is wrong, and its last line is JSON."""

from __future__ import annotations

import json

import pytest
import torch

from sparse_forcing.cli import main
from sparse_forcing.errors import OutputError
from sparse_forcing.eval.bench import attention as bench_attention
from sparse_forcing.eval.bench import timing
from sparse_forcing.eval.bench.attention_inputs import Inputs, Shape
from sparse_forcing.kernels.block_sparse_attention import block_sparse_attention
from sparse_forcing.kernels.block_sparse_attention.cpu import backend as cpu

SMALL = Shape(heads=2, head_dim=16, queries=64, keys=256, persistent=32, block=16)


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_run_reports_every_density_and_the_breakdown(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench_attention, "CPU_SHAPES", (SMALL,))
    assert bench_attention.run(device="cpu", output=tmp_path / "new", repeats=1) == 0
    report = last_line(capsys)
    assert report["ok"]
    assert len(report["attention"]) == 12  # 2 types, forward and forward + backward, 3 densities
    assert {row["density"] for row in report["attention"]} == {0.0625, 0.125, 0.25}
    assert {row["timing"] for row in report["attention"] + report["breakdown"]} == {"eager"}  # a CPU has no graphs
    assert set(report["breakdown"][0]["milliseconds"]) == {"compression", "selection", "attention", "dense"}
    assert (tmp_path / "new" / "bench_attention.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_is_not_timed(monkeypatch, capsys):
    real = cpu.forward

    def slightly_wrong(*arguments):
        out, *others = real(*arguments)
        return out * 1.02, *others

    monkeypatch.setattr(cpu, "forward", slightly_wrong)
    monkeypatch.setattr(bench_attention, "compare", lambda *_: pytest.fail("timed a wrong result"))
    assert bench_attention.run(device="cpu") == 1
    assert not last_line(capsys)["ok"]


def test_an_output_that_is_a_file_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        bench_attention.run(device="cpu", output=tmp_path / "file")


def test_a_device_that_is_none_is_one_line(capsys):
    assert main(["bench", "attention", "--device", "nowhere"]) == 2
    assert "--device nowhere: not usable" in capsys.readouterr().err


def test_the_rivals_compute_the_same_thing():
    torch.manual_seed(0)
    inputs = Inputs.random(SMALL, torch.float32, torch.device("cpu"))
    tensors = inputs.query, inputs.key_pool, inputs.value_pool
    index = inputs.lists(0.25)
    assert torch.allclose(inputs.sparse(index, "cpu")(*tensors), inputs.dense(inputs.mask(index))(*tensors), atol=1e-5)
    everything = inputs.lists(1.0)
    assert torch.allclose(inputs.sparse(everything, "cpu")(*tensors), inputs.dense()(*tensors), atol=1e-5)
    assert block_sparse_attention(*tensors, index).out.shape == inputs.query.shape


def test_the_ideal_counts_the_persistent_set():
    assert Shape(heads=1, head_dim=64, queries=64, keys=1024).ideal(0.25) == 4
    assert Shape(heads=1, head_dim=64, queries=64, keys=1024, persistent=1024).ideal(0.0625) == pytest.approx(
        2 / 1.0625
    )


def fake_clock(monkeypatch) -> None:
    """Everything takes 20 seconds, on any device."""
    monkeypatch.setattr(timing, "time_in_turns", lambda functions, *_: dict.fromkeys(functions, 20.0))


def test_graphs_come_before_eager_calls_and_count_single_calls(monkeypatch):
    fake_clock(monkeypatch)
    monkeypatch.setattr(timing, "capture_graph", lambda function, _: function)
    found = timing.measure_seconds({"dense": print}, torch.device("cuda"), 1, graphs=True)
    assert list(found.items()) == [("graph", {"dense": 2.0}), ("eager", {"dense": 20.0})]
    assert list(timing.measure_seconds({"dense": print}, torch.device("cuda"), 1, graphs=False)) == ["eager"]


@pytest.mark.parametrize("device", ["xpu", "cuda"])
def test_where_nothing_can_be_captured_eager_calls_remain_and_a_line_says_so(device, monkeypatch, capsys):
    def refuses(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nlong advice")

    fake_clock(monkeypatch)
    if device == "cuda":
        monkeypatch.setattr(torch.cuda, "device", refuses)
    assert timing.measure_seconds({"dense": print}, torch.device(device), 1, graphs=True) == {"eager": {"dense": 20.0}}
    note = capsys.readouterr().out.splitlines()
    assert len(note) == 1
    assert note[0].startswith(f"no CUDA graph on {device}, eager calls only: ")


def test_every_way_of_timing_gets_its_rows(monkeypatch, capsys):
    def both(functions, *_, graphs):
        ways = ("graph", "eager") if graphs else ("eager",)
        return {way: dict.fromkeys(functions, 1.0) for way in ways}

    monkeypatch.setattr(bench_attention, "measure_seconds", both)
    arguments = SMALL, torch.float32, torch.device("cpu"), "cpu"
    rows = bench_attention.compare(*arguments, False, 1)
    assert [row["timing"] for row in rows] == ["graph"] * 3 + ["eager"] * 3
    assert [" fwd graph " in line for line in capsys.readouterr().out.splitlines()] == [True, False]
    assert [row["timing"] for row in bench_attention.compare(*arguments, True, 1)] == ["eager"] * 3
