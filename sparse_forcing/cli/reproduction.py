"""What `make reproduce` does: the config, the trainings it means, and the evaluation of every student."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_forcing.config import load_config, to_plain
from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.claims import FULL_CACHE
from sparse_forcing.eval.judged_rollouts import chunks_until
from sparse_forcing.eval.miniature import EvaluationConfig, Student, digest, evaluate_student, time_students
from sparse_forcing.eval.report.miniature import write_miniature, write_selector
from sparse_forcing.files import atomic_write_json, read_json
from sparse_forcing.pipeline import SparseForcingPipeline
from sparse_forcing.scenes.held_out import held_out_prompts
from sparse_forcing.training.miniature import VARIANTS, Training, TrainingPlan, plan_trainings
from sparse_forcing.training.recall import measure_recall

MAIN = (*FULL_CACHE, "sparse")
"""Variants that the central claims compare, on all prompts; the others are judged on `ablation_prompts`."""


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """What to train, whom to judge, and on what."""

    training: TrainingPlan
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    variants: tuple[str, ...] = tuple(VARIANTS)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.variants if name not in VARIANTS]:
            raise ConfigError(f"variants: unknown {', '.join(unknown)}; known are {', '.join(VARIANTS)}")
        if not self.variants or len(set(self.variants)) < len(self.variants):
            raise ConfigError("variants: at least one is needed, each once")


def read_reproduce_config(path: Path, overrides: list[str]) -> ReproduceConfig:
    """The config, checked, and a proof that plots can be drawn. Raises ConfigError."""
    config = load_config(ReproduceConfig, path, overrides)
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("reproduce draws plots and needs matplotlib: pip install 'sparse-forcing[eval]'")
    return config


class Reproduction:
    """The whole work of a config under one output folder. Making it checks every stage; nothing is trained yet."""

    def __init__(self, config: ReproduceConfig, output: Path) -> None:
        self.config, self.folder = config, output / "evaluation"
        names = dict.fromkeys(VARIANTS[name].student for name in config.variants)
        chains = plan_trainings(config.training, list(names), output)
        trainings = {training.folder: training for chain in chains.values() for training in chain}
        self.trainings: list[Training] = list(trainings.values())
        self.students = {
            name: Student(
                model=chains[VARIANTS[name].student][-1].model,
                memory=VARIANTS[name].memory_of(config.training.memory),
            )
            for name in config.variants
        }

    def train(self) -> int:
        """Every training that is not complete; returns 0, or the exit code of the one that was stopped."""
        for training in self.trainings:
            if code := training.run():
                return code
        return 0

    def evaluate(self, results: Path, selector_results: Path) -> None:
        """Judge every variant, time the main ones, measure the selector; write the results."""
        settings = self.config.evaluation
        prompts = held_out_prompts(settings.prompts, seed=settings.seed)
        variants: dict[str, dict[str, Any]] = {}
        for name, student in self.students.items():
            count = settings.prompts if name in MAIN else settings.ablation_prompts
            variants[name] = evaluate_student(name, student, prompts[:count], settings, self.folder)
        folders = {name: found.pop("folder") for name, found in variants.items()}
        result = {
            "settings": to_plain(self.config),
            "prompts": prompts,
            "variants": variants,
            "timing": self.time(prompts[: settings.timing_prompts]),
            "recall": self.recall(prompts[: settings.recall_prompts], selector_results),
        }
        write_miniature(result, folders, prompts[: settings.sheet_prompts], results)
        print((results / "miniature.md").read_text(), end="")

    def time(self, prompts: list[str]) -> dict[str, Any] | None:
        """Seconds of the main variants' rollouts, in turns; None with fewer than two of them."""
        timed = {name: student for name, student in self.students.items() if name in MAIN}
        return time_students(timed, prompts, self.config.evaluation, self.folder) if len(timed) > 1 else None

    def recall(self, prompts: list[str], results: Path) -> list[dict[str, Any]] | None:
        """Recall on the sparse student's own rollouts as far as the training horizon; None without that student."""
        student = self.students.get("sparse")
        if student is None:
            return None
        pipe = SparseForcingPipeline.from_pretrained(str(student.model))
        seed = self.config.evaluation.seed
        settings = {"prompts": len(prompts), "chunks": chunks_until(pipe, 1), "seed": seed}
        key = digest(pipe.weights_sha256, to_plain(student.memory), settings, prompts)
        path = self.folder / f"recall-{key}.json"
        if not path.is_file():
            print("recall of the selector", file=sys.stderr, flush=True)
            rows = measure_recall(pipe, prompts, chunks=settings["chunks"], seed=seed, memory=student.memory)
            atomic_write_json(path, rows)
        rows = read_json(path)
        write_selector(rows, {**settings, "weights_sha256": pipe.weights_sha256}, results)
        return rows
