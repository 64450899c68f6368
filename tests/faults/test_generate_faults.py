"""`generate` against bad prompts, outputs, interruptions and rivals (faults 20 to 23, 26, 27)."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_forcing.cli import main
from sparse_forcing.files import output_lock
from sparse_forcing.media.video import read_video, write_video


def run(*arguments: object) -> int:
    return main(["generate", *map(str, arguments)])


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("sparse-forcing generate: error: ")
    return captured.err


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt"),
        ([""], "prompt 1 is empty"),
        (["fine", " \n "], "prompt 2 is empty"),
        (["a", "red", "circle"], '3 prompts would make 3 videos; put one prompt in quotes: "a red circle"'),
        (["a red circle", "and", "a", "square"], "4 prompts would make 4 videos"),
        (["красный", "круг"], "2 prompts would make 2 videos"),
        (["p", "--", "--seed", "3"], "--seed stands after --, where nothing is a flag"),
        (["p", "--", "--seed=3"], "--seed stands after --"),
        (["--", "--bogus"], "--bogus stands after --, where nothing is a flag; move it before (see"),
        (["p", "--", "--steps=4"], "move it before; did you mean --num-inference-steps?"),
        (["p", "--steps", "4"], "did you mean --num-inference-steps?"),
        (["p", "--size", "64"], "did you mean --height and --width?"),
        (["p", "--size=64"], "did you mean --height and --width?"),
        (["p", "--output", "a.mpeg"], "only .mp4"),
        (["p", "--output", "a.mpeg/../b.TS"], "only .mp4"),
        (["x" * 1_000_000], "1000000 characters"),
        (["a\udc80b"], "not valid Unicode"),
        (["a\0b"], "control character"),
        (["p", "--prompt-file", "x"], "not both"),
        (["p", "--num-frames", "9", "--seconds", "1"], "not both"),
        (["p", "--image", "a.png", "--video", "b.mp4"], "not both"),
        (["p", "--image", "none.png"], "none.png: no such image"),
        (["p", "--video", "none.mp4"], "none.mp4: no such video"),
        (["p", "--num-frames", "0"], "--num-frames must be between 1"),
        (["p", "--num-frames", "-8"], "--num-frames must be between 1"),
        (["p", "--num-frames", "eight"], "invalid whole number value: 'eight'"),
        (["p", "--seconds", "nan"], "invalid number value: 'nan'"),
        (["p", "--seconds", "-1"], "--seconds must be above 0"),
        (["p", "--guidance-scale", "inf"], "invalid number value"),
        (["p", "--seed", "-1"], "--seed must be between 0"),
        (["p", "--seed", "1e30"], "invalid whole number"),
        (["p", "--seed", str(2**62), "--num-samples", "2"], "with 2 samples the seeds go beyond"),
        (["--suite", "vbench", "--seed", str(2**62)], "with 5 samples the seeds go beyond"),
        (["p", "--memory", "sprase"], "invalid choice: 'sprase'"),
        (["p", "--memory", "full", "--density", "0.5"], "--density has no effect with --memory full"),
        (["p", "--memory", "window", "--overlay"], "--overlay shows persistent blocks"),
        (["p", "--output", "x.gif"], "only .mp4"),
        (["p", "a q", "--output", "x.mp4"], "one file for 2 videos"),
        (["p", "--num-samples", "2", "--output", "x.mp4"], "one file for 2 videos"),
        (["p", "--num-frame", "8"], "did you mean --num-frames?"),
        (["p", "--suite", "vbench"], "brings its own prompts"),
        (["--suite", "vbench", "--shard", "4/4"], "shard 4/4"),
        (["--suite", "vbench", "--shard", "-1/4"], "--shard"),
        (["p", "--then", "five", "q"], "--then 'five': give seconds and a prompt"),
        (["p", "--then", "nan", "q"], "--then 'nan': give seconds and a prompt"),
        (["p", "--then", "inf", "q"], "--then 'inf': give seconds and a prompt"),
        (["p", "--then", "-1", "q"], "--then -1: times must rise and be above 0"),
        (["p", "--then", "1e308", "q"], "--then 1e+308: no video is longer than 1e+07 s"),
        (["p", "--then", "5"], "--then: expected 2 arguments"),
        (["p", "--then", "0", "q"], "--then 0: times must rise and be above 0"),
        (["p", "--then", "5", "q", "--then", "5", "r"], "--then 5: times must rise"),
        (["p", "--then", "5", " "], "--then 5: prompt is empty"),
        (["p", "--recache"], "--recache has no effect without --then"),
        (["p", "--then", "5", "q", "--recache", "--memory", "full"], "--recache has no effect with --memory full"),
        (["p", "a q", "--then", "5", "r"], "--then goes on from one prompt, not from 2"),
        (["p", "--then", "5", "q", "--check"], "--check judges a video by one prompt"),
        (["--suite", "vbench", "--then", "5", "q"], "--suite vbench judges a video by one prompt"),
        (["p", "--output", "/proc/x"], "cannot write into /proc/x"),
        (["p", "--output", "/proc/x.mp4"], "cannot write into /proc"),
        (["a purple thought", "--check"], "unknown words thought"),
        (["p", "--persistent-blocks", "9" * 30], "--persistent-blocks must be between 0 and 1e+06"),
        (["p", "--window-frames", "9" * 20], "--window-frames must be between 1"),
        (["p", "--tile", "1", "1", "9" * 20], "--tile must be between 1"),
        (["p", "--seed", "9" * 400], "--seed must be between 0"),
        (["--suite", "vbench", "--grid", "g.gif"], "--grid is for prompts of your own"),
        (["p", "--grid", "g.png"], "only .webp and .gif files are written"),
        (["p", "--num-samples", "65", "--grid", "g.gif"], "65 videos are more than the 64"),
        (["p", "--grid", "n" * 300 + ".gif"], "File name too long"),
        (["p", "--output", "a.MP3"], "only .mp4"),
        (["p", "--num-samples", "100001"], "--num-samples must be between 1"),
        (["p", "a q", "--num-samples", "60000"], "120000 videos are more than"),
        (["p", "--output", "a\nb.mp4"], "contains the control character '\\n'"),
        (["p", "--grid", "a\x7f.gif"], "contains the control character"),
        (["p", "--output", ".sf-tmp-1-ab.mp4"], "a name of temporary files"),
        (["p", "--image", "n" * 300], "File name too long"),
        (["p", "--video", "n" * 300], "File name too long"),
        (["p", "--output", "n" * 300], "File name too long"),
        (["p", "--output", "n" * 300 + ".mp4"], "File name too long"),
        (["p", "--suite", "vbench", "--output", "n" * 300], "brings its own prompts"),
        (["--suite", "vbench", "--output", "n" * 300], "File name too long"),
        (["p", "--image", "\udcff.png"], "--image '\\udcff.png': the name is not valid UTF-8"),
        (["p", "--output", "new/\udcff.mp4"], "the name is not valid UTF-8"),
        (["p", "--output", "new/" + "s" * 251 + ".mp4"], "the name is longer than 255 bytes"),
    ],
)
def test_bad_input_is_one_line_before_any_model_is_loaded(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert message in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("never_loads")
def test_prompts_from_a_pipe_that_nobody_writes_to_are_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert run("--prompt-file", tmp_path / "pipe", "--output", tmp_path / "out") == 2
    assert "pipe: a pipe that nobody writes to" in one_line(capsys)
    read, write = os.pipe()  # as `<(command)` of a shell
    os.write(write, b"a\0ball\n")
    os.close(write)
    assert run("--prompt-file", f"/dev/fd/{read}", "--output", tmp_path / "out") == 2
    os.close(read)
    assert "line 1 contains the control character" in one_line(capsys)


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "contains no prompts"),
        (b"\n \n\r\n", "contains no prompts"),
        (b"fine\n\xff\xfe\n", "line 2: not UTF-8"),
        (b"fine\n" + b"x" * 30_000, "line 2 has 30000 characters"),
        (b"fine\na\x00b", "line 2 contains the control character"),
        (b"fine\r\r\xff", "line 3: not UTF-8"),
        (b"a\n" * 1_000_000, "more than 1000000 lines"),
        (b"# only\n  # comments", "contains no prompts"),
        (b'{"prompt": "a ball"}\n', "give the file a name that ends in .jsonl"),
    ],
)
def test_bad_prompt_file_names_the_line(
    content: bytes, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    assert run("--prompt-file", tmp_path / "p.txt", "--output", tmp_path / "out") == 2
    assert message in one_line(capsys)
    assert run("--prompt-file", tmp_path / "none.txt", "--output", tmp_path / "out") == 2
    assert "cannot read prompts" in one_line(capsys)


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": 5}', "line 1: expected an object with a prompt"),
        ('{"prompt": "a"}\n["b"]', "line 2: expected an object"),
        ('{"prompt": "a"}\n{"prompt": ', "line 2: not valid JSON"),
        ('{"prompt": " "}', "line 1 is empty"),
        ('{"prompt": "a", "sed": 5}', "line 1: unknown field 'sed'; the fields are prompt, original_prompt"),
        ('{"prompt": "a", "seed": 5.5}', "line 1: seed: expected a whole number from 0 to"),
        ('{"prompt": "a", "seed": true}', "line 1: seed: expected a whole number"),
        ('{"prompt": "a", "negative_prompt": " "}', "line 1: negative_prompt is empty"),
        ('{"prompt": "a", "image": "a.png", "video": "b.mp4"}', "line 1: image and video: give one of them"),
        ('{"prompt": "a", "image": 5}', "line 1: image: expected text"),
        ('{"prompt": "a", "image": "none.png"}', "none.png: no such image"),
        ('{"prompt": "a", "then": "b"}', "line 1: then: expected a list"),
        ('{"prompt": "a", "then": [["b", 5]]}', "line 1: then: expected seconds and a prompt"),
        ('{"prompt": "a"}\n{"prompt": "a", "then": [[0, "b"]]}', "line 2: --then 0: times must rise and be above 0"),
        ('{"prompt": "a", "then": [[1e308, "b"]]}', "line 1: --then 1e+308: no video is longer than"),
        ('{"prompt": "a", "then": [[1e999, "b"]]}', "line 1: --then inf: no video is longer than"),
        ('{"prompt": "a", "then": [[1%s, "b"]]}' % ("0" * 400), "line 1: --then inf: no video is longer than"),
        ('{"prompt": "a", "then": [[NaN, "b"]]}', "NaN is not a JSON number"),
        ('{"prompt": "a", "then": [[-1, "b"]]}', "line 1: --then -1: times must rise"),
        ('{"prompt": "a", "then": [[true, "b"]]}', "line 1: then: expected seconds and a prompt"),
        ('{"prompt": "a", "then": [["5", "b"]]}', "line 1: then: expected seconds and a prompt"),
        ('{"prompt": "a", "then": [[5, null]]}', "line 1: then: expected seconds and a prompt"),
        ('{"prompt": "a", "output": "../a.mp4"}', "line 1: output: expected the path of an .mp4 file inside"),
        ('{"prompt": "a", "output": "a\\nb.mp4"}', "line 1: output: 'a\\nb.mp4': the name contains the control"),
        ('{"prompt": "a", "output": "a\\u2028/b.mp4"}', "the name contains the control character '\\u2028'"),
        ('{"prompt": "a", "output": "\\ud800/a.mp4"}', "line 1: output: '\\ud800/a.mp4': the name is not valid UTF-8"),
        (
            '{"prompt": "a", "output": ".sf-tmp-9-x/a.mp4"}',
            "line 1: output: '.sf-tmp-9-x/a.mp4': .sf-tmp-9-x is a name",
        ),
        ('{"prompt": "a", "seed": 5}\n{"prompt": "b", "seed": 4611686018427387905}', "line 2: seed: expected a whole"),
        ('{"prompt": "a", "output": "/a.mp4"}', "line 1: output: expected the path"),
        ('{"prompt": "a", "output": "a.gif"}', "line 1: output: expected the path"),
        ('{"prompt": "a", "output": "overlay/a.mp4"}', "line 1: output: overlay is a folder for files beside"),
        ('{"prompt": "a", "output": "a.mp4"}\n{"prompt": "b", "output": "a.mp4"}', "two prompts name this output"),
    ],
)
def test_bad_jsonl_names_the_line(
    content: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    assert run("--prompt-file", tmp_path / "p.jsonl", "--output", tmp_path / "out") == 2
    assert message in one_line(capsys)


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("a.mp4", "a.MP4", "a.mp4 and out/a.MP4 would share"),
        ("sub/a.mp4", "sub/./a.mp4", "two prompts name this output"),
        ("link/a.mp4", "real/a.mp4", "link/a.mp4 and out/real/a.mp4 lead to one file"),
        ("real/b.mp4", "real/a.mp4", "real/b.mp4 and out/real/a.mp4 lead to one file"),
        ("lit/c.mp4", "real/c.mp4", "real/overlay/c.mp4"),
        ("link/a.MP4", "real/a.mp4", "would share"),
        ("a.mp4", "a.mp4/b.mp4", "out/a.mp4/b.mp4 lies below"),
        ("a.json/b.mp4", "a.mp4", "which is a file of out/a.mp4"),
    ],
)
def test_rows_that_would_lose_a_video_to_another_are_refused(
    first: str,
    second: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "real" / "overlay").mkdir(parents=True)
    (tmp_path / "out" / "link").symlink_to("real")
    (tmp_path / "out" / "lit").symlink_to("real/overlay")
    (tmp_path / "out" / "real" / "b.mp4").symlink_to("a.mp4")
    rows = ({"prompt": "one", "output": first}, {"prompt": "two", "output": second})
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    before = files_below(tmp_path)
    for more in ((), ("--shard", "0/2")):  # the other one is in the other shard
        assert run("--prompt-file", "p.jsonl", "--output", "out", *more) == 2
        assert message in one_line(capsys)
    assert files_below(tmp_path) == before


@pytest.mark.usefixtures("never_loads")
def test_samples_of_a_row_have_seeds_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "seed": 4611686018427387903}')
    assert run("--prompt-file", tmp_path / "p.jsonl", "--num-samples", 3, "--output", tmp_path / "out") == 2
    assert "line 2: seed 4611686018427387903: with 3 samples the seeds go beyond" in one_line(capsys)


def test_prompt_files_hold_comments_or_jsonl(stub, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("# two videos\n\na red ball\n  # not this one\nball # 2\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red ball", "seed": 5}\n\n# no\n{"image": null, "prompt": "ball"}')
    for name, second in (("p.txt", "ball # 2"), ("p.jsonl", "ball")):
        stub.calls.clear()
        assert run("--prompt-file", tmp_path / name, "--output", tmp_path / "out") == 0
        assert [call["prompt"] for call in stub.calls] == ["a red ball", second]


def test_a_line_of_jsonl_says_what_is_its_videos_alone(stub, tmp_path: Path) -> None:
    out, starts = tmp_path / "out", tmp_path / "starts"
    starts.mkdir()
    Image.new("RGB", (32, 32), (250, 0, 0)).save(starts / "red.png")
    write_video(starts / "blue.mp4", np.full((20, 32, 32, 3), (0, 0, 250), np.uint8), 16)
    rows: list[dict] = [
        {"prompt": "plain"},
        {"prompt": "red", "seed": 5, "image": "red.png", "output": "cats/red.mp4", "negative_prompt": "dull"},
        {"prompt": "blue", "video": "blue.mp4", "original_prompt": "the blue one", "then": [[0.5, "green"]]},
    ]
    (starts / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run("--prompt-file", starts / "jobs.jsonl", "--output", out, "--num-frames", 16) == 0
    assert files_below(out) == sorted(
        f"{name}.{suffix}" for name in ("0000-plain-seed0", "0002-blue-seed0", "cats/red") for suffix in ("json", "mp4")
    )
    plain, red, blue = stub.calls
    assert "image" not in plain
    assert "video" not in plain
    assert (red["image"] == (250, 0, 0)).all()
    assert (red["negative_prompt"], red["prompt_changes"]) == ("dull", {})
    assert sum(len(piece) for piece in blue["video"]) == 8  # whole chunks of the ten at the rate of `tiny`
    assert blue["prompt_changes"] == {8: "green"}
    records = [json.loads((out / f"{name}.json").read_text()) for name in ("cats/red", "0002-blue-seed0")]
    assert (records[0]["seed"], records[0]["settings"]["negative_prompt"]) == (5, "dull")
    assert records[0]["settings"]["image"] == str(starts / "red.png")
    assert records[1]["original_prompt"] == "the blue one"
    assert run("--prompt-file", starts / "jobs.jsonl", "--output", out, "--num-samples", 2) == 0
    assert "cats/red-seed6.mp4" in files_below(out)


def test_what_a_line_names_is_never_written_over(stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "a.mp4", np.zeros((20, 32, 32, 3), np.uint8), 16)
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a", "video": "a.mp4", "output": "a.mp4"}')
    assert run("--prompt-file", tmp_path / "jobs.jsonl", "--output", tmp_path) == 2
    assert "which this run reads" in one_line(capsys)
    assert stub.calls == []


def test_hundred_thousand_prompts_are_planned_quickly_with_distinct_names(tmp_path: Path) -> None:
    from sparse_forcing.sampling.generation.jobs import GenerateConfig, plan

    (tmp_path / "p.txt").write_text("\ufeff" + "a red ball\r\n" * 100_000, "utf-8")
    jobs = plan(GenerateConfig(prompt_file=tmp_path / "p.txt", output=tmp_path / "out"))
    assert len({job.video for job in jobs}) == 100_000
    assert {job.prompt for job in jobs} == {"a red ball"}
    for end in ("\r", "\n", "\r\n"):
        (tmp_path / "p.txt").write_bytes(end.join(["one", "", "two"]).encode())
        assert [job.prompt for job in plan(GenerateConfig(prompt_file=tmp_path / "p.txt"))] == ["one", "two"]


@pytest.mark.usefixtures("stub")
def test_hostile_prompts_stay_inside_the_folder(tmp_path: Path) -> None:
    prompts = ["../x", "a\nb", "/abs", "字" * 100, "CON", "🎈", ".", "the same", "the same", "$(touch x)"]
    assert run(*prompts, "--output", tmp_path / "out") == 0
    written = files_below(tmp_path)
    assert len(written) == 2 * len(prompts)
    assert all(name.startswith("out/0") and name.count("/") == 1 for name in written)
    records = [json.loads((tmp_path / name).read_text("utf-8")) for name in written if name.endswith(".json")]
    assert sorted(record["prompt"] for record in records) == sorted(prompts)


def test_sidecar_tells_what_was_made(stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "a ball",
        "--output",
        tmp_path / "clip.mp4",
        "--num-frames",
        20,
        "--seed",
        7,
        "--memory",
        "window",
        "--json",
    ]
    assert run(*arguments, "--num-inference-steps", 3, "--window-frames", 5) == 0
    captured = capsys.readouterr()
    assert "4 more were made and cut off" in captured.err
    record = json.loads((tmp_path / "clip.json").read_text())
    assert json.loads(captured.out) == [record | {"path": str(tmp_path / "clip.mp4")}]
    assert (record["prompt"], record["seed"], record["video"]) == ("a ball", 7, "clip.mp4")
    assert (record["num_frames"], record["trimmed_frames"], record["fps"]) == (20, 4, 16)
    assert record["weights_sha256"] == "0" * 64
    assert record["versions"]["sparse-forcing"]
    assert record["settings"]["memory"] | {"kind": "window", "window_frames": 5} == record["settings"]["memory"]
    assert record["settings"] | {"num_inference_steps": 3, "guidance_scale": 2, "device": "cpu"} == record["settings"]
    assert record["seconds_per_chunk"] == [0.5] * 3
    assert record["generated_fps_without_decoding"] == pytest.approx(24 / 1.5)
    assert record["generated_fps_with_decoding"] == pytest.approx(24 / 1.875)
    assert record["cache_bytes_peak"] == 3000
    assert 0 < record["time_to_first_frame"] < record["wall_seconds"]
    assert stub.calls[0]["num_frames"] == 20
    frames, info = read_video(tmp_path / "clip.mp4")
    assert len(frames) == 20
    assert (info.height, info.width) == (256, 256)


def test_seconds_become_frames_and_scale_is_obeyed(stub, tmp_path: Path) -> None:
    assert run("p", "--seconds", 1.5, "--scale", 1, "--height", 24, "--width", 40, "--output", tmp_path / "c.mp4") == 0
    assert read_video(tmp_path / "c.mp4")[0].shape == (24, 24, 40, 3)


@pytest.mark.usefixtures("stub")
def test_overlay_lights_up_persistent_blocks_only(tmp_path: Path) -> None:
    assert run("p", "--overlay", "--scale", 1, "--output", tmp_path / "c.mp4", "--height", 48, "--width", 48) == 0
    assert files_below(tmp_path) == ["c.json", "c.mp4", "overlay/c.mp4"]
    plain = read_video(tmp_path / "c.mp4")[0].astype(float)
    overlay = read_video(tmp_path / "overlay" / "c.mp4")[0].astype(float)
    np.testing.assert_allclose(overlay[:, 16:, 16:], 0.4 * plain[:, 16:, 16:], atol=4)
    assert (overlay[:, :6, :6, 0] > plain[:, :6, :6, 0] + 40).all()


@pytest.mark.parametrize("error", [RuntimeError("encoder"), KeyboardInterrupt(), MemoryError()])
def test_failure_midway_leaves_neither_video_nor_sidecar(
    stub, tmp_path: Path, error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.mp4").write_bytes(b"old")

    def fail(index: int) -> None:
        if index == 1:
            raise error

    stub.on_chunk = fail
    arguments = ("p", "--num-frames", 32, "--output", tmp_path / "c.mp4", "--overlay")
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError):
            run(*arguments)
    elif isinstance(error, KeyboardInterrupt):
        assert run(*arguments) == 130
        assert "interrupted" in capsys.readouterr().err
    else:
        assert run(*arguments) == 2
        assert "out of memory at size" in one_line(capsys)
    assert files_below(tmp_path) == ["c.mp4"]
    assert (tmp_path / "c.mp4").read_bytes() == b"old"


def test_failing_encoder_leaves_nothing(stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    from sparse_forcing.media import video

    class Failing(video.VideoWriter):
        def write(self, frames: object) -> None:
            super().write(frames)
            if self.frames_written > 8:
                raise av.error.ExternalError(1, "encoder")

    monkeypatch.setattr(video, "VideoWriter", Failing)
    with pytest.raises(av.error.ExternalError):
        run("p", "--output", tmp_path / "c.mp4")
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_cleans_up(stub, tmp_path: Path, number: signal.Signals) -> None:
    def terminate(index: int) -> None:
        if index == 1:
            os.kill(os.getpid(), number)

    stub.on_chunk = terminate
    before = signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with pytest.raises(SystemExit) as stop:
            run("p", "--overlay", "--output", tmp_path / "c.mp4")
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert stop.value.code == 128 + number
    assert files_below(tmp_path) == []


def test_ignored_hangup_stays_ignored(stub, tmp_path: Path) -> None:
    stub.on_chunk = lambda index: os.kill(os.getpid(), signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run("p", "--output", tmp_path / "c.mp4") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_finished_videos_survive_a_later_failure_and_are_skipped(stub, tmp_path: Path) -> None:
    def interrupt(index: int) -> None:
        if len(stub.calls) == 2:
            raise KeyboardInterrupt

    stub.on_chunk = interrupt
    assert run("number one", "number two", "--output", tmp_path) == 130
    assert files_below(tmp_path) == ["0000-number-one-seed0.json", "0000-number-one-seed0.mp4"]
    stub.on_chunk = lambda index: None
    assert run("number one", "number two", "--output", tmp_path, "--skip-existing") == 0
    assert [call["prompt"] for call in stub.calls] == ["number one", "number two", "number two"]


@pytest.mark.usefixtures("stub")
def test_same_seed_gives_the_same_bytes_in_any_company(tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    assert run("another one", "p", "--num-samples", 2, "--output", tmp_path / "many") == 0
    assert run("p", "--seed", 1, "--output", tmp_path / "one.mp4") == 0
    assert digest(tmp_path / "many" / "0001-p-seed1.mp4") == digest(tmp_path / "one.mp4")
    assert digest(tmp_path / "many" / "0001-p-seed0.mp4") != digest(tmp_path / "one.mp4")


@pytest.mark.usefixtures("never_loads")
def test_second_run_into_one_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with output_lock(tmp_path):
        assert run("p", "--output", tmp_path) == 2
    assert "another run" in one_line(capsys)


@pytest.mark.usefixtures("never_loads")
def test_file_where_a_folder_is_meant_and_the_reverse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert run("p", "--output", tmp_path / "file") == 2
    assert "it is a file, not a folder" in one_line(capsys)
    (tmp_path / "file.mp4").mkdir()
    assert run("p", "--output", tmp_path / "file" / "c.mp4") == 2
    assert "cannot write into" in one_line(capsys)


def test_warnings_of_the_model_are_shown_once_and_kept(
    stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import warnings

    stub.on_chunk = lambda index: warnings.warn("prompt cut after 24 words", UserWarning, stacklevel=1)
    assert run("p", "--output", tmp_path / "c.mp4") == 0
    assert capsys.readouterr().err.count("prompt cut after 24 words") == 1
    assert json.loads((tmp_path / "c.json").read_text())["warnings"] == ["prompt cut after 24 words"]


def test_suite_writes_official_names_apart_from_sidecars_and_resumes(stub, tmp_path: Path) -> None:
    arguments = ("--suite", "vbench", "--shard", "0/400", "--num-samples", 2, "--output", tmp_path)
    assert run(*arguments) == 0
    made = len(stub.calls)
    videos = os.listdir(tmp_path / "videos")
    assert made == len(videos) == len(os.listdir(tmp_path / "sidecars")) > 2
    assert all(name.endswith(("-0.mp4", "-1.mp4")) for name in videos)
    record = json.loads((tmp_path / "sidecars" / f"{videos[0]}.json").read_text("utf-8"))
    assert videos[0].startswith(record["original_prompt"])
    (tmp_path / "videos" / videos[0]).unlink()
    assert run(*arguments) == 0
    assert len(stub.calls) == made + 1


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("blocked", "kind", "message"),
    [
        ("c.json", "folder", "it is a folder"),
        ("c.mp4/x", "folder", "0000-p-seed0.mp4"),
        ("overlay", "file", "it is a file, not a folder"),
        ("overlay/c.mp4", "folder", "it is a folder"),
        ("c.json", "file", "does not belong to a video"),
        ("resume/c", "file", "resume/c: it is a file, not a folder"),
        ("live", "file", "live: it is a file, not a folder"),
    ],
)
def test_every_target_is_checked_before_the_model_is_loaded(
    tmp_path: Path, blocked: str, kind: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = "c.mp4"
    if blocked == "c.mp4/x":
        output, blocked = "", "0000-p-seed0.mp4"
    path = tmp_path / blocked
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if kind == "folder" else path.write_text('{"notes": "mine"}')
    flags = ("--overlay", "--memory", "sparse", "--live", "--resume", "--checkpoint-every", 1)
    assert run("p", *flags, "--output", tmp_path / output) == 2
    assert message in one_line(capsys)
    assert files_below(tmp_path) == ([blocked] if kind == "file" else [])


@pytest.mark.usefixtures("stub")
def test_replaced_video_keeps_neither_old_sidecar_nor_old_overlay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparse_forcing.errors import OutputError
    from sparse_forcing.sampling.generation import generate

    def full(*_: object) -> None:
        raise OutputError("cannot write: full")

    arguments = ("p", "--output", tmp_path / "c.mp4")
    assert run(*arguments, "--overlay") == 0
    assert files_below(tmp_path) == ["c.json", "c.mp4", "overlay/c.mp4"]
    assert run(*arguments, "--seed", 1) == 0
    assert files_below(tmp_path) == ["c.json", "c.mp4"]
    monkeypatch.setattr(generate, "atomic_write_json", full)
    assert run(*arguments, "--seed", 2) == 2
    assert files_below(tmp_path) == ["c.mp4"]


@pytest.mark.usefixtures("stub")
def test_temporaries_of_a_killed_run_are_swept_from_every_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "overlay"):
        folder.mkdir(exist_ok=True)
        (folder / ".sf-tmp-999999999-ab.mp4").write_bytes(b"x")
    assert run("p", "--overlay", "--output", tmp_path / "c.mp4") == 0
    assert files_below(tmp_path) == ["c.json", "c.mp4", "overlay/c.mp4"]


@pytest.mark.usefixtures("stub")
def test_wide_pictures_are_enlarged_no_further_than_a_video_goes(tmp_path: Path) -> None:
    assert run("p", "--height", 16, "--width", 4096, "--num-frames", 1, "--output", tmp_path / "c.mp4") == 0
    assert json.loads((tmp_path / "c.json").read_text())["scale"] == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--height", 512, "--width", 512, "--scale", 64], "--scale 64: pictures of 512x512"),
        (["--overlay", "--persistent-blocks", 0], "--overlay shows persistent blocks"),
        (["--seconds", 1e6], "at most 1000000"),
    ],
)
def test_what_depends_on_the_model_is_checked_before_the_first_chunk(
    stub, tmp_path: Path, flags: list[object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("p", "--output", tmp_path / "new" / "c.mp4", *flags) == 2
    assert message in one_line(capsys)
    assert stub.calls == []
    assert list(tmp_path.iterdir()) == []


def test_overlay_needs_a_memory_with_persistent_blocks(
    stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparse_forcing.memory.config import MemoryConfig

    monkeypatch.setattr(stub, "default_memory", MemoryConfig(kind="window"), raising=False)
    assert run("p", "--overlay", "--output", tmp_path / "c.mp4") == 2
    assert "this window memory keeps none" in one_line(capsys)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("Storage size calculation overflowed with sizes=[9]")])
def test_out_of_memory_names_the_size_and_the_flags_that_matter(
    stub, tmp_path: Path, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(index: int) -> None:
        raise error

    stub.on_chunk = fail
    assert run("p", "--output", tmp_path / "c.mp4") == 2
    message = one_line(capsys)
    assert "size 32x32, 16 frames, with --memory sparse" in message
    assert "--persistent-blocks" in message
    assert run("p", "--memory", "full", "--output", tmp_path / "c.mp4") == 2
    assert "lower --num-frames" in one_line(capsys)


def test_prompts_may_stand_anywhere(stub, tmp_path: Path) -> None:
    assert run("one", "--num-frames", 8, "number two", "--output", tmp_path, "three") == 0
    assert [call["prompt"] for call in stub.calls] == ["one", "number two", "three"]
    assert run("one", "--output", tmp_path, "number two", "--", "-x", "-- y") == 0
    assert [call["prompt"] for call in stub.calls[3:]] == ["one", "number two", "-x", "-- y"]


def test_json_tells_of_finished_videos_when_a_later_one_fails(
    stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(index: int) -> None:
        if len(stub.calls) == 2:
            raise MemoryError

    stub.on_chunk = fail
    assert run("number one", "number two", "--json", "--output", tmp_path) == 2
    assert [record["prompt"] for record in json.loads(capsys.readouterr().out)] == ["number one"]


def test_chunks_that_take_long_are_lines_where_there_is_no_terminal(
    stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparse_forcing.cli import progress

    arguments = ("p", "--num-frames", 24, "--output", tmp_path / "c.mp4")
    assert run(*arguments) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    assert run(*arguments) == 0
    lines = [f"1/1 p: {done} of 24 frames" for done in (8, 16, 24)]
    assert capsys.readouterr().err.splitlines() == lines
