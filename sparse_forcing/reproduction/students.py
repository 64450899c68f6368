"""Evaluation of several students, each with its own memory, on the same held-out prompts: resumable batch by batch.

Every batch is a file; an interruption loses the one that was running. A folder's name carries a hash of all that its
numbers depend on, so nothing measured under other settings is taken for an answer.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch

from sparse_forcing.config import to_plain
from sparse_forcing.devices import resolve_device
from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.bench.judging import JudgedBatch, RolloutSettings, judge_batch, stream, summarize_rollouts
from sparse_forcing.files import atomic_path, atomic_write_json, read_json
from sparse_forcing.media.images import read_image
from sparse_forcing.memory import MemoryConfig
from sparse_forcing.reproduction.plan import hash_settings
from sparse_forcing.sampling.pipeline import SparseForcingPipeline


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings of the evaluation that every student gets.

    Args:
        prompts: held-out prompts; ablation_prompts: the first of them, for the variants that are ablations.
        batch_size: rollouts generated together.
        horizons: multiples of the training horizon.
        timing_prompts: prompts whose rollouts are timed, several students in turns.
        recall_prompts: prompts of the selector's recall.
        sheet_prompts: the first prompts, whose frames are kept to look at.
        device: "auto" is the GPU where there is one.
        timing_device: device on which rollouts are timed. At this size a GPU waits for its host and would not show
            what differs.
    """

    prompts: int = 200
    ablation_prompts: int = 100
    batch_size: int = 10
    horizons: tuple[int, ...] = (1, 4, 12)
    seed: int = 0
    timing_prompts: int = 3
    recall_prompts: int = 32
    sheet_prompts: int = 4
    device: str = "auto"
    timing_device: str = "cpu"

    def __post_init__(self) -> None:
        counts = ("ablation_prompts", "batch_size", "timing_prompts", "recall_prompts", "sheet_prompts")
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.prompts < 2:
            raise ConfigError(f"prompts: at least 2 are needed for an interval, got {self.prompts}")
        for name in ("ablation_prompts", "timing_prompts", "recall_prompts", "sheet_prompts"):
            if getattr(self, name) > self.prompts:
                raise ConfigError(f"{name}: {getattr(self, name)} is more than prompts, {self.prompts}")
        self.rollouts()  # checks the horizons
        if min(self.horizons) != 1:
            raise ConfigError(
                f"horizons: needs 1, the training horizon that others are compared with, got {list(self.horizons)}"
            )

    def rollouts(self) -> RolloutSettings:
        return RolloutSettings(horizons=self.horizons, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class Student:
    """A model, the memory it is judged with, and a name for its weights that changes whenever they may."""

    model: Path
    memory: MemoryConfig
    weights: str

    def load(self, device: str) -> SparseForcingPipeline:
        """The model on a device ("auto": the GPU where there is one)."""
        return SparseForcingPipeline.from_pretrained(str(self.model)).to(resolve_device(device, "evaluation:"))

    def describe(self) -> list[Any]:
        return [self.weights, to_plain(self.memory)]


@dataclass(frozen=True, kw_only=True)
class StudentRollouts:
    """One student's rollouts of all its prompts, in files of a folder under `out`, one for each batch."""

    name: str
    student: Student
    prompts: list[str]
    config: EvaluationConfig
    out: Path

    @cached_property
    def folder(self) -> Path:
        settings = to_plain(self.config.rollouts())
        return self.out / f"{self.name}-{hash_settings([self.student.describe(), settings])}"

    @property
    def batches(self) -> list[int]:
        """Number of the first prompt of every batch."""
        return list(range(0, len(self.prompts), self.config.batch_size))

    def batch(self, first: int) -> list[str]:
        return self.prompts[first : first + self.config.batch_size]

    def path(self, first: int) -> Path:
        """Named after its prompts: judging more prompts goes on from the batches that are there."""
        return self.folder / f"batch-{first:05d}-{hash_settings([self.batch(first)])}.json"

    def judge(self, first: int) -> int:
        """Roll out and judge a batch; its file appears last."""
        pipe = self.student.load(self.config.device)
        batch = self.batch(first)
        began = time.monotonic()
        judged = judge_batch(pipe, self.student.memory, batch, first, self.config.rollouts())
        self.folder.mkdir(parents=True, exist_ok=True)
        for number in range(first, min(first + len(batch), self.config.sheet_prompts)):
            _write_frames(_frames_path(self.folder, number, self.prompts[number]), judged.frames[number - first])
        atomic_write_json(self.path(first), {k: v for k, v in asdict(judged).items() if k != "frames"})
        seconds = (time.monotonic() - began) / len(batch)
        done = f"{self.name}: prompts {first + 1} to {first + len(batch)} of {len(self.prompts)}"
        print(f"{done}, {seconds:.1f} s each", file=sys.stderr, flush=True)
        return 0

    def result(self) -> dict[str, Any]:
        """The summary (see `summarize_rollouts`), the memory, the hash of the weights, and `records`: per horizon a
        column of values for each number."""
        pipe = SparseForcingPipeline.from_pretrained(str(self.student.model))
        batches = [_read_batch(self.path(first)) for first in self.batches]
        horizons = self.config.horizons
        return {
            "memory": to_plain(self.student.memory),
            "weights_sha256": pipe.weights_sha256,
            **summarize_rollouts(pipe, batches),
            "records": {str(h): _columns([r for b in batches for r in b.records[h]]) for h in horizons},
        }


def _read_batch(path: Path) -> JudgedBatch:
    found = read_json(path)
    records = {int(horizon): rows for horizon, rows in found.pop("records").items()}
    return JudgedBatch(records=records, frames=np.zeros(0, np.uint8), **found)


def _columns(records: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    return {name: [None if r[name] is None else round(r[name], 6) for r in records] for name in records[0]}


def _write_frames(path: Path, frames: np.ndarray) -> None:
    """Frames [N, H, W, 3] side by side."""
    with atomic_path(path) as temporary:
        iio.imwrite(temporary, np.concatenate(list(frames), 1), plugin="pillow", extension=".png")


def read_frames(folder: Path, number: int, prompt: str) -> np.ndarray:
    """[H, horizons * W, 3] of a prompt and its number."""
    return read_image(_frames_path(folder, number, prompt))


def _frames_path(folder: Path, number: int, prompt: str) -> Path:
    """Named after the prompt, as batches are: frames of other prompts in the same folder are not taken for its own."""
    return folder / f"frames-{number:03d}-{hash_settings([prompt])}.png"


@dataclass(frozen=True, kw_only=True)
class DecodingTimes:
    """Model seconds of whole rollouts to the longest horizon, one prompt at a time. The students take turns chunk by
    chunk in one process, so that whatever else the machine does slows them all alike.

    The file: `device`, `threads`; per student `rollouts` (seconds of each prompt's) and `chunks` (median seconds of
    each chunk).
    """

    students: dict[str, Student]
    prompts: list[str]
    config: EvaluationConfig
    out: Path

    @cached_property
    def path(self) -> Path:
        described = {name: student.describe() for name, student in self.students.items()}
        settings = [to_plain(self.config.rollouts()), self.config.timing_device]
        return self.out / f"timing-{hash_settings([described, settings, self.prompts])}.json"

    def measure(self) -> int:
        pipes = {name: s.load(self.config.timing_device) for name, s in self.students.items()}
        settings = self.config.rollouts()
        seconds: dict[str, list[list[float]]] = {name: [] for name in pipes}
        for number, prompt in enumerate(self.prompts):
            rollouts = [
                stream(pipes[name], student.memory, [prompt], number, settings)
                for name, student in self.students.items()
            ]
            turns = [[chunk.seconds for chunk in turn] for turn in zip(*rollouts)]
            for name, row in zip(seconds, zip(*turns)):
                seconds[name].append(list(row))
            print(f"timing: {number + 1}/{len(self.prompts)} prompts", file=sys.stderr, flush=True)
        found = {
            name: {"rollouts": [sum(row) for row in rows], "chunks": np.median(rows, 0).tolist()}
            for name, rows in seconds.items()
        }
        self.out.mkdir(parents=True, exist_ok=True)
        atomic_write_json(
            self.path,
            {"device": str(next(iter(pipes.values())).device), "threads": torch.get_num_threads(), "students": found},
        )
        return 0
