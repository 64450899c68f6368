"""make reproduce at toy size: the whole command, doing nothing twice, resuming, and refusing what cannot work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparse_forcing.cli import run_module
from sparse_forcing.errors import VideoError
from sparse_forcing.reproduction import plan
from sparse_forcing.reproduction import students as evaluation
from sparse_forcing.reproduction.plan import CONFIGS, STUDENTS, VARIANTS
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.training.engine.guard import STOPPED
from tests.forked import Forked
from tests.training.conftest import CHUNK, HORIZON, SIZE

pytestmark = pytest.mark.xdist_group("reproduce")  # one process: `done` takes ten seconds

SHORT = ["loop.global_batch=2", "loop.micro_batch=1", f"data.size={SIZE}", f"data.latent_frames={HORIZON}"]
CAUSAL_DISTILL = [*SHORT, f"rollout_frames={HORIZON}", "sampler.steps=2", "critic_ratio=1"]
LONG = [f"data.latent_frames={4 * HORIZON}", "data.world_gap=null"]  # for a world to leave and come back
DISTILL = [*CAUSAL_DISTILL, "score.causal_window=null"]


def settings(model: Path) -> dict[str, Any]:
    forcing = [*SHORT, "weighting=schedule"]
    return {
        "training": {
            "model": str(model),
            "memory": {
                "kind": "sparse",
                "window_frames": 4,
                "tile": [2, 2, 2],
                "persistent_blocks": 1,
                "density": 0.5,
            },
            "teacher": {"config": "tiny-teacher.yaml", "steps": 1, "set": forcing},
            "start": {"config": "tiny-sparse-start.yaml", "steps": 1, "set": forcing},
            "student": {"config": "tiny-distill.yaml", "steps": 1, "set": DISTILL},
        },
        "evaluation": {
            "prompts": 4,
            "ablation_prompts": 2,
            "batch_size": 2,
            "horizons": [1, 2],
            "timing_prompts": 2,
            "recall_prompts": 2,
            "sheet_prompts": 1,
        },
        "worlds": {
            "model": str(model),
            "stages": [
                {"config": "tiny-return.yaml", "steps": 1, "set": [*forcing, *LONG]},
                {"config": "tiny-retention.yaml", "steps": 1, "set": [*SHORT, *LONG]},
            ],
            "bench": {"worlds": ["revisit"], "gaps": [2], "count": 2, "memories": ["full", "sparse"]},
        },
    }


def reproduce(folder: Path, config: dict[str, Any], *overrides: str) -> int:
    path = folder / "reproduce.yaml"
    path.write_text(json.dumps(config))  # which is YAML too
    flags = [flag for change in overrides for flag in ("--set", change)]
    return run_module(
        "sparse_forcing.cli.reproduce",
        [
            "--config",
            str(path),
            "--output",
            str(folder / "run"),
            "--results",
            str(folder / "results/miniature"),
            *flags,
        ],
    )


def files(folder: Path) -> dict[str, int]:
    """Every file and when it was written."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("reproduce")
    assert reproduce(folder, settings(model_folder)) == 0
    return folder


def test_every_variant_is_in_the_results(done: Path) -> None:
    result = json.loads((done / "results/miniature/miniature.json").read_text())
    assert list(result["variants"]) == list(VARIANTS)
    assert {name: row["prompts"] for name, row in result["variants"].items()} == {
        name: 4 if name in ("dense", "sparse") else 2 for name in VARIANTS
    }
    assert all(len(row["records"]["2"]["all"]) == row["prompts"] for row in result["variants"].values())
    # One set of weights for each student, whatever it is judged with.
    assert len({row["weights_sha256"] for row in result["variants"].values()}) == len(STUDENTS)
    assert set(result["timing"]["students"]) == {"dense", "dense-absolute", "sparse"}
    chunks = 2 * HORIZON // CHUNK
    assert all(len(row["chunks"]) == chunks for row in result["timing"]["students"].values())
    sparse, dense = result["variants"]["sparse"], result["variants"]["dense"]
    assert sparse["horizons"]["2"]["cache_bytes_peak"] < 1.1 * sparse["horizons"]["1"]["cache_bytes_peak"]
    assert dense["horizons"]["2"]["cache_bytes_peak"] == 2 * dense["horizons"]["1"]["cache_bytes_peak"]
    assert len(dense["cache_bytes"]) == chunks
    assert sparse["horizons"]["1"]["drift"]["mean"]["mean"] == 0 < sparse["horizons"]["2"]["drift"]["mean"]["mean"]
    assert {claim["met"] for claim in result["claims"]} <= {True, False}  # everything was measured
    table = (done / "results/miniature/miniature.md").read_text()
    assert all(f"| {name} | 2x |" in table for name in VARIANTS)
    for picture in ("accuracy.png", "drift.png", "cache.png", "samples.png"):
        assert (done / "results/miniature" / picture).read_bytes().startswith(b"\x89PNG")


def test_selector_results_are_of_held_out_rollouts(done: Path) -> None:
    found = json.loads((done / "results/selector/recall.json").read_text())
    assert [row["share"] for row in found["recall"]] == [0.0625, 0.125, 0.25]
    assert all(len(row["learned"]["prompts"]) == found["prompts"] == 2 for row in found["recall"])
    assert "gap closed" in (done / "results/selector/recall.md").read_text()


def test_what_comes_back_in_worlds_is_in_the_results(done: Path) -> None:
    found = json.loads((done / "results/recall/recall.json").read_text())
    assert found["memories"].keys() == {"full", "sparse"}
    assert "revisit" in (done / "results/recall/recall.md").read_text()
    for picture in ("recall.png", "sheet.png"):
        assert (done / "results/recall" / picture).read_bytes().startswith(b"\x89PNG")
    (model,) = (done / "run").glob("worlds-retention-*/pipeline")
    assert found["model"] == str(model), "the last stage's model is asked"
    assert len(list((done / "run").glob("worlds-forcing-*/pipeline"))) == 1


def test_a_second_call_does_nothing(done: Path, model_folder: Path) -> None:
    before = files(done / "run")
    assert reproduce(done, settings(model_folder)) == 0
    assert files(done / "run") == before


def test_changed_settings_train_what_depends_on_them_and_nothing_else(
    done: Path, model_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(settings(model_folder)))

    def folders(*overrides: str) -> set[str]:
        from sparse_forcing.reproduction.run import Reproduction, read_reproduce_config

        work = Reproduction(read_reproduce_config(path, list(overrides)), done / "run")
        return {training.folder.name for training in work.trainings}

    assert folders() == set()
    assert {name.rpartition("-")[0] for name in folders("training.student.steps=2")} == {
        f"student-{s}" for s in STUDENTS
    }
    assert len(folders("training.teacher.steps=2")) == 1 + len(STUDENTS)  # the starts do not see the teacher
    assert len(folders("training.seed=1")) == 1 + 2 * len(STUDENTS)
    selectors = folders("training.selector_weight=0.5")
    assert len(selectors) == 2 * sum(kind.learned_selector for kind in STUDENTS.values())


def test_nothing_is_trained_for_a_student_that_is_there(done: Path, model_folder: Path, tmp_path: Path) -> None:
    from sparse_forcing.reproduction.run import Reproduction, read_reproduce_config

    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(settings(model_folder)))
    run = tmp_path / "run"
    shutil.copytree(done / "run", run)
    for folder in [*run.glob("teacher-*"), *run.glob("start-*")]:
        shutil.rmtree(folder)
    work = Reproduction(read_reproduce_config(path, []), run)
    assert all(task.done() for task in work.tasks())
    shutil.rmtree(next(run.glob("student-sparse-*")))
    again = [task.name.rpartition("-")[0] for task in work.tasks() if not task.done()]
    assert set(again[:2]) == {"teacher", "start-sparse"}
    assert again[2:] == ["student-sparse"]


@pytest.mark.slow
def test_an_interrupted_evaluation_loses_one_batch(
    done: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(model_folder)
    config["variants"], config["evaluation"]["seed"] = ["dense", "sparse"], 1
    judged, judge, interruptions = [], evaluation.judge_batch, [3]

    def interrupted(*arguments: Any) -> Any:
        if [len(judged)] == interruptions:
            interruptions.clear()
            raise KeyboardInterrupt
        judged.append(arguments[3])
        return judge(*arguments)

    monkeypatch.setattr(evaluation, "judge_batch", interrupted)
    assert reproduce(done, config) == 130
    assert judged == [0, 2, 0]
    judged.clear()
    assert reproduce(done, config) == 0
    assert judged == [2]
    judged.clear()
    config["evaluation"] |= {"prompts": 6, "ablation_prompts": 4}
    assert reproduce(done, config) == 0
    assert judged == [4, 4]  # more prompts go on from what is there
    config["evaluation"] |= {"prompts": 4, "ablation_prompts": 2}
    assert reproduce(done, config) == 0
    assert judged == [4, 4]
    result = json.loads((done / "results/miniature/miniature.json").read_text())
    assert [row["prompts"] for row in result["variants"].values()] == [4, 4]
    unmeasured = [claim for claim in result["claims"] if claim["met"] is None]
    assert len(unmeasured) == 14, [claim["text"] for claim in unmeasured]


def test_a_stopped_training_is_reported_and_goes_on(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(model_folder)
    config["variants"] = ["training-free"]
    monkeypatch.setattr(plan.Training, "run", lambda training: STOPPED)
    assert reproduce(tmp_path, config) == STOPPED
    assert not (tmp_path / "results/miniature/miniature.md").exists()
    monkeypatch.undo()
    assert reproduce(tmp_path, config) == 0
    assert (tmp_path / "results/miniature/miniature.md").exists()


@pytest.mark.slow
def test_long_tuning_is_one_more_training_of_every_student(tmp_path: Path, model_folder: Path) -> None:
    config = settings(model_folder)
    config["variants"] = ["sparse"]
    rollouts = [*DISTILL, "windows=2", f"window_frames={CHUNK}"]
    config["training"]["long"] = {"config": "tiny-long.yaml", "steps": 1, "set": rollouts}
    assert reproduce(tmp_path, config) == 0
    (long,) = (tmp_path / "run").glob("long-sparse-*")
    result = json.loads((tmp_path / "results/miniature/miniature.json").read_text())
    judged = SparseForcingPipeline.from_pretrained(str(long / "pipeline"))
    assert result["variants"]["sparse"]["weights_sha256"] == judged.weights_sha256
    assert result["timing"] is None  # nothing to compare with


@pytest.mark.slow
def test_without_a_teacher_and_a_start_the_base_model_is_both(tmp_path: Path, model_folder: Path) -> None:
    config = settings(model_folder)
    config["variants"], config["worlds"] = ["dense", "sparse"], None
    config["training"] |= {
        "teacher": None,
        "start": None,
        "student": {
            "config": "tiny-distill.yaml",
            "steps": 1,
            "set": CAUSAL_DISTILL,
        },
    }
    assert reproduce(tmp_path, config) == 0
    trained = sorted(path.parent for path in (tmp_path / "run").glob("*/pipeline"))
    assert [folder.name.rpartition("-")[0] for folder in trained] == ["student-dense", "student-sparse"]
    weights = [SparseForcingPipeline.from_pretrained(str(folder / "pipeline")).weights_sha256 for folder in trained]
    base = SparseForcingPipeline.from_pretrained(str(model_folder)).weights_sha256
    assert len({*weights, base}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("variants=[dense, spares]", "variants: unknown spares"),
        ("training.model=nowhere", "model 'nowhere': not an embedded model"),
        ("training.student.steps=0", "student: "),
        ("training.student.config=none.yaml", "cannot read config"),
        ("training.student.set=[memory.kind=full]", "memory.kind is the same for every student"),
        ("training.teacher.set=[no.such=1]", "teacher: "),
        ("training.teacher=null", "needs score.causal_window"),
        (f"training.student.set=[{', '.join(CAUSAL_DISTILL)}]", "the trained one is bidirectional"),
        ("training.memory.window_frames=3", "window"),
        ("training.memory.density=1.0", "density must be below 1"),
        ("evaluation.horizons=[2, 4]", "horizons: needs 1, the training horizon"),
        ("evaluation.horizons=[1, 1]", "horizons: expected different"),
        ("evaluation.recall_prompts=5", "recall_prompts: 5 is more than prompts, 4"),
        ("evaluation.colour=red", "evaluation.colour"),
        ("evaluation.device=nonsense", "evaluation.device: nonsense"),
        ("evaluation.timing_device=nonsense", "evaluation.timing_device: nonsense"),
    ],
)
def test_bad_settings_are_one_line_before_any_work(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    assert reproduce(tmp_path, settings(model_folder), change) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not list((tmp_path / "run").glob("*-*"))


def test_a_horizon_that_is_not_the_clip_is_refused(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(model_folder)
    config["training"]["student"]["set"] = [*DISTILL, f"rollout_frames={2 * HORIZON}"]
    assert reproduce(tmp_path, config) == 2
    assert f"rollout_frames: {2 * HORIZON} latent frames" in capsys.readouterr().err


def test_frames_of_other_prompts_are_not_taken_for_its_own(done: Path, model_folder: Path) -> None:
    from sparse_forcing.reproduction.run import Reproduction, read_reproduce_config

    path = done / "reproduce.yaml"
    path.write_text(json.dumps(settings(model_folder)))
    sparse = Reproduction(read_reproduce_config(path, []), done / "run").rollouts["sparse"]
    assert evaluation.read_frames(sparse.folder, 0, sparse.batch(0)[0]).ndim == 3
    with pytest.raises(VideoError, match="no such image"):
        evaluation.read_frames(sparse.folder, 0, "a blue ring")


def test_the_shipped_config_is_sound(tmp_path: Path) -> None:
    from sparse_forcing.reproduction.run import Reproduction, read_reproduce_config

    work = Reproduction(read_reproduce_config(CONFIGS / "reproduce.yaml", []), tmp_path)
    assert list(work.rollouts) == list(VARIANTS)
    assert work.config.evaluation.prompts >= 200
    assert max(work.config.evaluation.horizons) == 12
    # Starts need the base model alone and the worlds nothing, so that a second process has work from the first minute.
    assert {t.folder.name.split("-")[0] for t in work.trainings if not t.parents} == {"start", "worlds"}
    for stage in ("start", "student"):
        assert len({t.config.loop.steps for t in work.trainings if t.folder.name.startswith(stage)}) == 1


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path: Path, model_folder: Path) -> None:
    """Each training runs once, and both end with the whole result."""
    config = settings(model_folder)
    config["variants"] = ["dense", "training-free", "sparse"]
    path = tmp_path / "reproduce.yaml"
    path.write_text(json.dumps(config))
    both = []
    for who in "ab":
        own = [
            "--config",
            str(path),
            "--output",
            str(tmp_path / "run"),
            "--results",
            str(tmp_path / f"{who}/miniature"),
        ]
        both.append(Forked(tmp_path / f"{who}.log", run_module, "sparse_forcing.cli.reproduce", own))
    codes, said = zip(*(process.finish() for process in both))
    assert codes == (0, 0), said
    trainings = [line for text in said for line in text.splitlines() if line.startswith("training ")]
    assert len(trainings) == len(set(trainings)) == 7  # two of them of worlds
    assert all("training " in text for text in said), said
    found = [json.loads((tmp_path / f"{who}/miniature/miniature.json").read_text()) for who in "ab"]
    assert found[0] == found[1]
