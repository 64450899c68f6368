"""What the commands print and leave behind, beyond `generate` (tests/faults/test_generate_faults.py)."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

from sparse_forcing.cli import doctor, main, note
from sparse_forcing.errors import SparseForcingError
from sparse_forcing.media.video import probe


def test_data_writes_captioned_clips_that_do_not_depend_on_how_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--num-frames", "8", "--size", "32", "--seed", "5"]
    assert main(["data", "clips", str(tmp_path / "a"), "--num-clips", "3", "--json", *sizes]) == 0
    assert json.loads(capsys.readouterr().out) == {"manifest": str(tmp_path / "a" / "manifest.jsonl"), "clips": 3}
    assert main(["data", "clips", str(tmp_path / "b"), "--num-clips", "1", *sizes]) == 0
    rows = [json.loads(line) for line in (tmp_path / "a" / "manifest.jsonl").read_text().splitlines()]
    assert len({row["seed"] for row in rows}) == 3
    assert all(row["prompt"] for row in rows)
    assert probe(tmp_path / "a" / rows[2]["video"]).frames == 8
    first = [hashlib.sha256((tmp_path / name / "000000.mp4").read_bytes()).hexdigest() for name in "ab"]
    assert first[0] == first[1]


def test_data_manifest_is_what_evaluation_reads(tmp_path: Path) -> None:
    from sparse_forcing.eval.measuring.manifest import load_entries

    assert main(["data", "clips", str(tmp_path), "--num-clips", "2", "--num-frames", "8", "--size", "32"]) == 0
    assert [entry.video.name for entry in load_entries(tmp_path / "manifest.jsonl")] == ["000000.mp4", "000001.mp4"]


def test_data_writes_worlds_with_what_comes_back(tmp_path: Path) -> None:
    from sparse_forcing.eval.measuring.manifest import load_entries
    from sparse_forcing.scenes.worlds.record import read_record

    sizes = ["--num-clips", "2", "--size", "32", "--gap", "16-24", "--ground", "striped", "--seed", "4"]
    assert main(["data", "clips", str(tmp_path), "--world", "revisit", *sizes]) == 0
    assert [entry.video.name for entry in load_entries(tmp_path / "manifest.jsonl")] == ["000000.mp4", "000001.mp4"]
    for number, line in enumerate((tmp_path / "worlds.jsonl").read_text().splitlines()):
        record = json.loads(line)
        assert record["video"] == f"{number:06d}.mp4"
        assert probe(tmp_path / record["video"]).frames == len(record["boxes"]) == 80
        assert 16 <= max(entry["gap"] for entry in record["returns"]) <= 24
        world = read_record(record)
        assert (world.kind, world.ground.kind, world.index) == ("revisit", "striped", number)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "clips", "OUT", "--gap", "8"], "--gap has no effect without --world"),
        (["data", "clips", "OUT", "--world", "swaps", "--two-objects"], "--two-objects has no effect with --world"),
        (["data", "clips", "OUT", "--world", "swaps", "--num-frames", "9"], "9 frames are too few for swaps"),
        (["data", "clips", "OUT", "--world", "maze"], "invalid choice"),
        (["data", "clips", "OUT", "--world", "swaps", "--gap", "x"], "--gap"),
        (["data", "clips", "OUT", "--num-frames", "0"], "--num-frames must be at least 1"),
        (["data", "clips", "OUT", "--num-frames", "99999999999"], "error: out of memory; "),
        (["data", "clips", "OUT", "--num-clips", "1000001"], "--num-clips 1000001: at most 1000000"),
        (["data", "clips", "OUT", "--world", "reappear", "--gap", "x"], "invalid N[-N] value: 'x'"),
        (["bench", "rollout", "--prompts", "99999999999"], "--prompts: must be between 1 and 1000000"),
        (["bench", "rollout", "--horizons", "0"], "--horizons: must be between 1 and 1000000"),
        (["bench", "change", "--seed", "-1"], "--seed: must be between 0 and"),
        (["bench", "stream", "--seed", "9" * 30], "--seed: must be between 0 and"),
        (["bench", "stream", "--chunks", "99999999999"], "--chunks: must be between 0 and 1000000"),
        (["bench", "recall", "--count", "0"], "--count: must be between 1 and 1000000"),
        (["data", "clips", "OUT", "--seed", "-1"], "--seed"),
        (["data", "clips", "/proc/x"], "cannot write into"),
        (["train", "pretrain", "--output", "/proc/x"], "cannot write into"),
        (
            ["train", "pretrain", "--output", "OUT", "--set", "loop.sede=1"],
            "loop.sede: unknown setting; did you mean loop.seed?",
        ),
        (["train", "pretrain", "--output", "OUT", "--set", "loop.seed=x"], "loop.seed: expected a whole number"),
        (["convert", "/none.pt", "OUT"], "/none.pt: no such"),
        (["convert", __file__, "/etc"], "/etc exists already"),
        (["evaluate", "OUT", "--aggregate", "x.json"], "error"),
        (["evaluate", "OUT", "--suite", "vbnch"], "invalid choice"),
        (["evaluate", "OUT", "--resamples", "99999999999"], "resamples may be up to 1000000"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "out") if word == "OUT" else word for word in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"sparse-forcing {arguments[0]}: error: ")
    assert message in captured.err
    assert list(tmp_path.iterdir()) == []


def test_train_hands_the_config_to_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_forcing.training.recipes.embedded import pretrain

    seen = []
    monkeypatch.setattr(pretrain, "train", lambda config, output, resume: seen.append((config.loop.seed, output)) or 0)
    (tmp_path / "c.yaml").write_text("loop: {seed: 3}\nema_decay: 9e-1\n")
    arguments = [
        "train",
        "pretrain",
        "--config",
        str(tmp_path / "c.yaml"),
        "--set",
        "loop.seed=4",
        "--output",
        str(tmp_path),
    ]
    assert main(arguments) == 0
    assert seen == [(4, tmp_path)]


def test_convert_refuses_a_folder_in_use_and_writes_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = types.ModuleType("sparse_forcing.model_folder.convert")

    def convert(source: Path, target: Path, options: dict) -> types.SimpleNamespace:
        (target / "config.json").write_text("{}")
        return types.SimpleNamespace(tensors=1, preset=None, remarks=[])

    fake.convert, fake.ConvertOptions = convert, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sparse_forcing.model_folder.convert", fake)
    (tmp_path / "w.pt").write_bytes(b"x")
    assert main(["convert", str(tmp_path / "w.pt"), str(tmp_path / "out"), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["sha256"]) == ["config.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "manifest.json"]
    assert main(["convert", str(tmp_path / "w.pt"), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_doctor_reports_every_check_and_survives_a_broken_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def _video():
        raise RuntimeError("no codec\nsecond line")

    monkeypatch.setattr(doctor, "CHECKS", (doctor._versions, doctor._devices, doctor._backends, _video))
    assert main(["doctor", "--json"]) == 1
    findings = {row["subject"]: row for row in json.loads(capsys.readouterr().out)}
    assert findings["torch"]["state"] == "ok"
    assert findings["cpu"]["state"] == "ok"
    assert findings["block_sparse_attention reference"]["state"] == "ok"
    assert findings["video"] == {"subject": "video", "state": "broken", "detail": "RuntimeError: no codec"}


def test_doctor_notices_a_missing_requirement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "einops", None)
    monkeypatch.setattr(doctor, "REQUIRED", ("einops",))
    monkeypatch.setattr(doctor, "OPTIONAL", ("surely_not_installed",))
    monkeypatch.setattr(doctor, "CHECKS", (doctor._versions,))
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "einops" in line or "surely" in line] == ["broken", "no"]


def test_doctor_checks_every_embedded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparse_forcing.weights.manifest import write_manifest

    monkeypatch.setattr("sparse_forcing.model_folder.folder.EMBEDDED_MODELS", tmp_path)
    monkeypatch.setattr(doctor, "CHECKS", (doctor._embedded_models, doctor._video))
    assert main(["doctor"]) == 1
    assert "no embedded model" in capsys.readouterr().out
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pipeline.json").write_text("{}")
        (tmp_path / name / "w.safetensors").write_bytes(b"weights")
        write_manifest(tmp_path / name)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "model one" in out
    assert "model two" in out
    (tmp_path / "two" / "w.safetensors").write_bytes(b"weightz")
    assert main(["doctor"]) == 1
    assert "SHA-256 differs" in capsys.readouterr().out


def test_error_is_one_line_whatever_the_message_holds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: object) -> int:
        raise SparseForcingError("two\n  lines")

    monkeypatch.setattr(doctor, "run", run)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "sparse-forcing doctor: error: two lines\n"


def test_closed_pipe_is_quiet() -> None:
    root = Path(__file__).resolve().parents[2]
    command = f"(sleep 0.1; exec {sys.executable} -m sparse_forcing --help) | true"
    done = subprocess.run(["sh", "-c", command], cwd=root, capture_output=True, text=True)
    assert done.stderr == ""


def test_a_reader_that_is_gone_does_not_end_the_work(tmp_path: Path) -> None:
    program = (
        "import sys, time; from sparse_forcing.cli import doctor, main, note, say\n"
        "def run(_):\n"
        "    for number in range(3): say(number); note(number); time.sleep(0.2)\n"
        f"    open({str(tmp_path / 'done')!r}, 'w').close()\n"
        "    return 0\n"
        "doctor.run = run; sys.exit(main(['doctor']))"
    )
    (tmp_path / "p.py").write_text(program)
    root = Path(__file__).resolve().parents[2]
    command = f"{{ {sys.executable} {tmp_path / 'p.py'} 2>&1; echo $? >{tmp_path / 'code'}; }} | true"
    done = subprocess.run(["sh", "-c", command], env={"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.stderr == ""
    assert (tmp_path / "done").exists()
    assert (tmp_path / "code").read_text() == "0\n"


def test_warnings_are_one_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(
        doctor, "run", lambda _: shown.append(warnings.formatwarning("prompt cut", UserWarning, "a.py", 1)) or 0
    )
    before = warnings.formatwarning
    assert main(["doctor"]) == 0
    assert shown == ["warning: prompt cut\n"]
    assert warnings.formatwarning is before


@pytest.mark.parametrize("how", ["say(1)", "print(1)", "print(1, flush=True)", 'sys.stdout.write("1")'])
@pytest.mark.parametrize(("redirect", "code"), [(">/dev/full", 2), (">&-", 0), (">&- 2>&-", 0)])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_cannot_be_written_is_no_traceback(how: str, redirect: str, code: int) -> None:
    root = Path(__file__).resolve().parents[2]
    program = f"import sys; from sparse_forcing.cli import doctor, main, say; doctor.run = lambda _: 0 * bool({how})"
    command = f"{sys.executable} -c '{program}; sys.exit(main([\"doctor\"]))' {redirect}"
    done = subprocess.run(["sh", "-c", command], cwd=root, capture_output=True, text=True)
    assert done.returncode == code
    message = "sparse-forcing doctor: error: cannot write to standard output: No space left on device\n"
    assert done.stderr == (message if code else "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_log_on_a_full_disk_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: object) -> int:
        note("begun")
        print("going on", file=sys.stderr, flush=True)
        return 0

    with open("/dev/full", "w", buffering=1) as log:
        monkeypatch.setattr(sys, "stderr", log)
        monkeypatch.setattr(doctor, "run", run)
        assert main(["doctor"]) == 0
        assert sys.stderr is log
    with open("/dev/full", "w", buffering=1) as log:
        monkeypatch.setattr(sys, "stderr", log)
        assert main(["no such command"]) == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (FileNotFoundError(2, "No such file or directory", "out/a"), "out/a: No such file or directory"),
    ],
)
def test_a_disk_that_fails_in_some_library_is_one_line_and_not_blamed_on_the_output(
    error: OSError, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: object) -> int:
        raise error

    monkeypatch.setattr(doctor, "run", run)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == f"sparse-forcing doctor: error: {message}\n"


def test_other_system_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: object) -> int:
        raise ConnectionError(104, "elsewhere")

    monkeypatch.setattr(doctor, "run", run)
    with pytest.raises(OSError, match="elsewhere"):
        main(["doctor"])


@pytest.mark.parametrize(
    "command", [["train", "forcing", "--output", "out", "--config"], ["convert"], ["evaluate", "--output", "out"]]
)
def test_a_name_too_long_to_look_up_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rest = ["new"] if command == ["convert"] else []
    assert main([*command, "n" * 300, *rest]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "File name too long" in line


@pytest.mark.parametrize("old", ["--top-k", "--top-k=0.5"])
def test_a_flag_under_its_former_name_is_told_the_new_one(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a red circle", old, "0.5"]) == 2
    assert "--top-k is called --density now" in capsys.readouterr().err
