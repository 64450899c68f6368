"""Recall of the learned selector as a piece of `make reproduce`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sparse_forcing.eval.bench.judging import chunks_until
from sparse_forcing.eval.bench.selector import measure_recall
from sparse_forcing.files import atomic_write_json
from sparse_forcing.reproduction.plan import hash_settings
from sparse_forcing.reproduction.students import Student


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
