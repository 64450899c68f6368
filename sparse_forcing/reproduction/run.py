"""What `make reproduce` does: the config, the trainings it means, and the evaluation of every student."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sparse_forcing.config import load_config, to_plain
from sparse_forcing.devices import resolve_device
from sparse_forcing.errors import ConfigError
from sparse_forcing.files import read_json
from sparse_forcing.reproduction.claims import FULL_CACHE
from sparse_forcing.reproduction.plan import VARIANTS, Training, TrainingPlan, plan_trainings
from sparse_forcing.reproduction.recall import SelectorRecall
from sparse_forcing.reproduction.students import DecodingTimes, EvaluationConfig, Student, StudentRollouts
from sparse_forcing.reproduction.tables import write_results, write_selector
from sparse_forcing.reproduction.tasks import Task, run_tasks
from sparse_forcing.reproduction.worlds import WorldPlan, WorldRecall, plan_world_training
from sparse_forcing.scenes.held_out import held_out_prompts

MAIN = ("dense", "sparse")
"""What the central claim compares, on all prompts; the other variants are judged on `ablation_prompts`."""
TIMED = (*FULL_CACHE, "sparse")


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """What to train, whom to judge, and on what; `worlds` says what comes back, None for nothing."""

    training: TrainingPlan
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    worlds: WorldPlan | None = None
    variants: tuple[str, ...] = tuple(VARIANTS)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.variants if name not in VARIANTS]:
            raise ConfigError(f"variants: unknown {', '.join(unknown)}; known are {', '.join(VARIANTS)}")
        if not self.variants or len(set(self.variants)) < len(self.variants):
            raise ConfigError("variants: at least one is needed, each once")


def read_reproduce_config(path: Path, overrides: list[str]) -> ReproduceConfig:
    """The config, checked, and a proof that plots can be drawn. Raises ConfigError."""
    config = load_config(ReproduceConfig, path, overrides)
    for name in ("device", "timing_device"):  # not after hours of training
        resolve_device(getattr(config.evaluation, name), f"evaluation.{name}:")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("reproduce draws plots and needs matplotlib: pip install 'sparse-forcing[eval]'")
    return config


class Reproduction:
    """The whole work of a config under one output folder. Making it checks every stage; nothing is trained yet."""

    def __init__(self, config: ReproduceConfig, output: Path) -> None:
        self.config, self.output, self.folder = config, output, output / "evaluation"
        kinds = dict.fromkeys(VARIANTS[name].student for name in config.variants)
        self.chains = plan_trainings(config.training, list(kinds), output)
        self.prompts = held_out_prompts(config.evaluation.prompts, seed=config.evaluation.seed)
        self.rollouts = {name: self._rollouts(name) for name in config.variants}
        timed = {name: rollouts.student for name, rollouts in self.rollouts.items() if name in TIMED}
        self.times = DecodingTimes(
            students=timed,
            prompts=self.prompts[: config.evaluation.timing_prompts],
            config=config.evaluation,
            out=self.folder,
        )
        self.recall = self._recall() if "sparse" in self.rollouts else None
        self.worlds = self._worlds(config.worlds) if config.worlds else None

    def _rollouts(self, name: str) -> StudentRollouts:
        training = self.chains[VARIANTS[name].student][-1]
        settings = self.config.evaluation
        student = Student(
            model=training.model,
            weights=training.folder.name,
            memory=VARIANTS[name].adapt_memory(self.config.training.memory),
        )
        prompts = self.prompts[: settings.prompts if name in MAIN else settings.ablation_prompts]
        return StudentRollouts(name=name, student=student, prompts=prompts, config=settings, out=self.folder)

    def _recall(self) -> SelectorRecall:
        settings = self.config.evaluation
        return SelectorRecall(
            student=self.rollouts["sparse"].student,
            prompts=self.prompts[: settings.recall_prompts],
            seed=settings.seed,
            device=settings.device,
            out=self.folder,
        )

    def _worlds(self, plan: WorldPlan) -> WorldRecall:
        training = plan_world_training(plan, self.output)
        return WorldRecall(training=training, bench=plan.bench, out=self.folder)

    @property
    def trainings(self) -> list[Training]:
        """Everything that is still to be trained, once, each after what it starts from."""
        last = [chain[-1] for chain in self.chains.values()] + ([self.worlds.training] if self.worlds else [])
        missing = [training for wanted in last for training in wanted.missing()]
        return list({training.folder: training for training in missing}.values())

    def tasks(self) -> Iterator[Task]:
        """All work, in an order in which one process can do it."""
        for training in self.trainings:
            yield Task(name=training.folder.name, done=training.complete, ready=training.ready, run=training.run)
        for name, rollouts in self.rollouts.items():
            trained = self.chains[VARIANTS[name].student][-1].complete
            for first in rollouts.batches:
                path = rollouts.path(first)
                yield Task(
                    name=f"{rollouts.folder.name}-{path.stem}",
                    done=path.is_file,
                    ready=trained,
                    run=partial(rollouts.judge, first),
                )
        if len(self.times.students) > 1:
            yield Task(name="timing", done=self.times.path.is_file, ready=self.is_trained, run=self.times.measure)
        if self.recall is not None:
            yield Task(name="recall", done=self.recall.path.is_file, ready=self.is_trained, run=self.recall.measure)
        if self.worlds is not None:
            ready = self.worlds.training.complete
            yield Task(name="worlds", done=self.worlds.is_done, ready=ready, run=self.worlds.measure)

    def is_trained(self) -> bool:
        return all(chain[-1].complete() for chain in self.chains.values())

    def run(self) -> int:
        """Do what is not done, with whatever other processes run the same command; returns 0 when everything is, or the
        exit code of a training that was stopped."""
        return run_tasks(list(self.tasks()), self.output / "locks")

    def write(self, results: Path) -> None:
        """Table, plots and JSON of everything that was measured; recall goes into folders beside `results`."""
        variants = {name: rollouts.result() for name, rollouts in self.rollouts.items()}
        result = {
            "settings": to_plain(self.config),
            "prompts": self.prompts,
            "variants": variants,
            "timing": read_json(self.times.path) if len(self.times.students) > 1 else None,
            "recall": read_json(self.recall.path)["recall"] if self.recall else None,
        }
        shown = self.prompts[: self.config.evaluation.sheet_prompts]
        write_results(result, {name: rollouts.folder for name, rollouts in self.rollouts.items()}, shown, results)
        if self.recall:
            write_selector(read_json(self.recall.path), results.parent / "selector")
        if self.worlds:
            self.worlds.write(results.parent / "recall")
        print((results / "miniature.md").read_text(), end="")
