"""bench stream: memories in turns, random weights; a sparse cache is flat, a full one grows; bad input is one line."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from sparse_forcing.cli import main
from sparse_forcing.eval.bench import stream as bench_stream
from sparse_forcing.eval.bench import stream_report
from sparse_forcing.eval.measuring.roofline import GPUS, H100, H200, ChunkSizes, count_keys, project_chunk
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.memory.config import parse_memory
from sparse_forcing.model_folder.defaults import PipelineConfig

TINY = ("bench", "stream", "--model-size", "tiny", "--device", "cpu", "--height", "64", "--width", "64")


def last_line(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_sparse_cache_is_flat_once_full_and_the_full_one_grows(capsys, tmp_path: Path) -> None:
    assert main([*TINY, "--chunks", "4", "--output", str(tmp_path)]) == 0
    report = last_line(capsys)
    assert report == json.loads((tmp_path / "stream.json").read_text("utf-8"))
    assert report["ok"]
    assert (report["weights"], report["decoding"]) == ("random", "not included")
    full, sparse = report["memories"]["full"], report["memories"]["sparse"]
    assert sparse["cache_bytes"][2] == sparse["cache_bytes"][3]  # two chunks fill the window, the third what persists
    assert all(after > before for before, after in pairwise(full["cache_bytes"]))
    for row in (full, sparse):
        assert len(row["chunk_seconds"]) == 4
        assert row["last_third_seconds"] == row["chunk_seconds"][-1]
        assert row["pixel_frames_per_second"] == pytest.approx(8 / row["last_third_seconds"])
        assert row["cache_bytes_peak"] == max(row["cache_bytes"])
        assert row["gpu_peak_bytes"] is None
    assert report["full_over_sparse"] == pytest.approx(full["last_third_seconds"] / sparse["last_third_seconds"])
    text = (tmp_path / "stream.md").read_text("utf-8")
    assert "decoding not included" in text
    assert "Projection for one H100" in text
    assert "| full |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-size", "wan-9b"], "--model-size: unknown 'wan-9b'; known are wan-1.3b, wan-14b, tiny, tiny-base"),
        (["--memories", "full", "elephant"], "memory 'elephant': the kind is one of"),
        (["--chunks", "-1"], "--chunks: must be between 0 and"),
        (["--seed", str(2**70)], "--seed: must be between 0 and"),
        (["--num-inference-steps", "0"], "--num-inference-steps: must be between 1 and 1000"),
        (["--memories", "window:x"], "memory 'window:x': window_frames is a number"),
        (["--cuda-graphs"], "no CUDA graphs"),
        (["--height", "63"], "height: 63 pixels is not a positive multiple of 8"),
        (["--device", "nowhere"], "--device nowhere: not usable"),
        (["--model", "tiny"], "--model has no effect on bench stream"),
        (["--output", "/proc/x"], "cannot write into /proc/x"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_built(arguments, message, capsys, monkeypatch) -> None:
    monkeypatch.setattr(bench_stream, "measure", lambda *_: pytest.fail("measured bad input"))
    assert main([*TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_latents_that_are_not_finite_end_the_run_without_a_report(capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_stream, "HEAD_STD", float("inf"))
    assert main([*TINY, "--chunks", "1", "--output", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "not finite" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["ok"] is False
    assert list(tmp_path.iterdir()) == []


def test_any_memory_in_words_is_measured_and_decoding_apart(capsys, tmp_path: Path) -> None:
    arguments = ["--memories", "window:2", "sparse:4,0.5,2", "--chunks", "3", "--decode", "--output", str(tmp_path)]
    assert main([*TINY, *arguments]) == 0
    report = last_line(capsys)
    window, sparse = report["memories"]["window:2"], report["memories"]["sparse:4,0.5,2"]
    assert window["memory"]["window_frames"] == 2
    assert sparse["memory"]["persistent_blocks"] == 2
    assert window["cache_bytes"] == 3 * window["cache_bytes"][:1]
    for row in (window, sparse):
        assert len(row["decode_seconds"]) == 3
        assert row["first_frames_seconds_decoded"] == row["chunk_seconds"][0] + row["decode_seconds"][0]
        assert min(row["chunk_seconds"][1:]) <= row["p50_seconds"] <= row["p95_seconds"] <= max(row["chunk_seconds"])
    assert (tmp_path / "stream.png").stat().st_size > 1000


def test_frames_per_second_over_a_horizon_need_a_rollout_that_long() -> None:
    result = {"fps": 8.0, "chunk_pixel_frames": 8}
    assert stream_report.horizons(result, [0.5] * 4) == {}
    assert stream_report.horizons(result, [1.0] + [0.5] * 19) == {"5": 40 / 3.0, "20": 160 / 10.5}


def test_the_projection_says_what_it_is_and_the_default_memory_keeps_its_bars() -> None:
    """By arithmetic, at Wan 2.1 1.3B's size: what docs/kernels.md decides the default by."""
    sizes = ChunkSizes(frames=3, rows=30, cols=52, dim=1536, ffn_dim=8960, layers=30, text_tokens=512, passes=5)
    words = ("full", "window:6", "window:21", "sparse")
    memories = {name: parse_memory(name, PipelineConfig().memory) for name in words}
    assert [count_keys(memory, sizes, 79) for memory in memories.values()] == [80 * 4680, 9360, 32760, 71 * 60]
    assert [count_keys(memories["sparse"], sizes, chunk) for chunk in (0, 1, 2)] == [39 * 60, 39 * 60, 71 * 60]
    found = stream_report.project_memories(memories, sizes, H100, pixel_frames=12, fps=16)
    sparse, over = found["sparse"], lambda name, span: sparse["horizons"][span] / found[name]["horizons"][span]
    assert over("full", "5") >= 1.17
    assert sparse["chunk_seconds"] <= 0.95 * found["window:6"]["chunk_seconds"]
    assert found["window:21"]["chunk_seconds"] >= 1.6 * sparse["chunk_seconds"]
    assert sparse["chunk_seconds"] == pytest.approx(sum(sparse["parts"].values()))


def test_without_chunks_the_projection_alone_is_printed_and_the_table_of_the_default_is_it(capsys) -> None:
    page = Path("docs/kernels.md").read_text()
    command = page.split("sparse-forcing bench stream --chunks 0", 1)[1].split("```", 1)[0].replace("\\\n", "").split()
    assert main(["bench", "stream", "--chunks", "0", *command]) == 0
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    assert report["memories"] == {}
    assert list(report["projection"]) == [gpu.name for gpu in GPUS]
    assert out.count("not measured") == len(GPUS)
    table = out[out.index(f"Projection for one {H200.name}") :].split("\n\n", 1)[1].splitlines()[:-1]
    assert len(table) == 2 + len(command[command.index("--memories") + 1 :])
    assert "\n".join(table) in page


def test_the_roofline_agrees_with_what_an_h200_took() -> None:
    """A window's chunk took 0.304 s with 68 launches a layer and pass, and casts around every norm: an upper bound."""
    sizes = ChunkSizes(frames=3, rows=30, cols=52, dim=1536, ffn_dim=8960, layers=30, text_tokens=512, passes=5)
    projected = project_chunk(MemoryConfig(kind="window"), sizes, 11, H200)
    assert 0.097 < projected.products < 0.098
    assert 0.6 * 0.304 < projected.total < 0.304


def test_weights_are_the_same_for_the_same_seed() -> None:
    config = bench_stream.StreamBenchConfig(model_size="tiny")
    architecture = bench_stream.find_architecture("tiny", {})
    first, second = (
        bench_stream.build(architecture, (8, 8), config, torch.device("cpu"), torch.float32) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters()))
    assert torch.equal(first.text, second.text)


def test_gpu_peaks_count_what_is_shared_and_what_is_own(monkeypatch) -> None:
    counters = {"now": 100, "peak": 0}

    def allocate(temporary: int, kept: int) -> None:
        counters["peak"] = max(counters["peak"], counters["now"] + kept + temporary)
        counters["now"] += kept

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: counters["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: counters["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: counters.update(peak=counters["now"]))
    meter = bench_stream.GpuMeter(torch.device("cuda"))
    for name, temporary, kept in (("full", 7, 50), ("sparse", 9, 20), ("full", 7, 30), ("sparse", 5, 0)):
        with meter.turn(name):
            allocate(temporary, kept)
    assert meter.peaks == {"full": 100 + 50 + 30 + 7, "sparse": 100 + 20 + 9}
