"""Recall as two pieces of `make reproduce`: blocks by the learned selector, objects of worlds by the base model."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from sparse_forcing.eval.bench import recall
from sparse_forcing.eval.bench.judging import chunks_until
from sparse_forcing.eval.bench.options import RecallBenchConfig
from sparse_forcing.eval.bench.selector import measure_recall
from sparse_forcing.files import atomic_write_json
from sparse_forcing.model_folder.folder import find_model
from sparse_forcing.reproduction.plan import hash_settings
from sparse_forcing.reproduction.students import Student
from sparse_forcing.weights.manifest import model_hash


@dataclass(frozen=True, kw_only=True)
class SelectorRecall:
    """Recall of the sparse student's selector on its own rollouts as far as the training horizon, in a file."""

    student: Student
    prompts: list[str]
    seed: int
    device: str
    out: Path

    @cached_property
    def path(self) -> Path:
        return self.out / f"recall-{hash_settings([self.student.describe(), self.prompts, self.seed])}.json"

    def measure(self) -> int:
        pipe = self.student.load(self.device)
        chunks = chunks_until(pipe, 1)
        rows = measure_recall(pipe, self.prompts, chunks=chunks, seed=self.seed, memory=self.student.memory)
        settings = {"prompts": len(self.prompts), "chunks": chunks, "seed": self.seed}
        self.out.mkdir(parents=True, exist_ok=True)
        atomic_write_json(self.path, {**settings, "weights_sha256": pipe.weights_sha256, "recall": rows})
        print("recall of the selector is measured", file=sys.stderr, flush=True)
        return 0


@dataclass(frozen=True, kw_only=True)
class WorldRecall:
    """`bench recall` in a folder named after its settings and the model's weights."""

    config: RecallBenchConfig
    out: Path

    @cached_property
    def folder(self) -> Path:
        weights = model_hash(find_model(self.config.model))
        return self.out / f"worlds-{hash_settings([asdict(self.config), weights])}"

    def is_done(self) -> bool:
        """Whether every file is there: the bench runs in a folder of another name."""
        return self.folder.is_dir()

    def measure(self) -> int:
        partial = self.folder.with_name(f"{self.folder.name}.partial")
        recall.run(replace(self.config, output=partial))
        partial.rename(self.folder)
        return 0

    def write(self, results: Path) -> None:
        """Copy table, figures and JSON to the results."""
        shutil.copytree(self.folder, results, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
