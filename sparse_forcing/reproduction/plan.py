"""The trainings of the paper in miniature: one teacher, and per student a causal start and its distillation. Without a
teacher's training the causal base model is every student's teacher, without a start's it is their start.

Every student gets the same data, steps and losses and differs in its memory alone. A training is a folder whose name
carries a hash of its settings and of everything it starts from: a finished one is used as it is, one that was cut off
goes on, and changed settings make another folder.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparse_forcing.config import to_plain
from sparse_forcing.errors import ConfigError
from sparse_forcing.files import read_json
from sparse_forcing.memory import MemoryConfig, MemoryGeometry, make_memory
from sparse_forcing.model.geometry import VideoGeometry
from sparse_forcing.model_folder.folder import find_model, load_autoencoder, read_defaults
from sparse_forcing.training.entry import load_stage
from sparse_forcing.weights.manifest import MANIFEST, model_hash

CONFIGS = Path(__file__).parents[1] / "training" / "configs"
_SHARED = ("model", "teacher", "memory", "learned_selector", "selector_weight")


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """A stage: a file of training/configs, its optimizer steps, and other settings to change (`a.b=c`)."""

    config: str
    steps: int
    set: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (change.partition("=")[0].strip() for change in self.set):
            if name.partition(".")[0] in _SHARED or name in ("loop.steps", "loop.seed"):
                raise ConfigError(f"set: {name} is the same for every student; set it in `training`, not in a stage")


@dataclass(frozen=True, kw_only=True)
class StudentKind:
    """What a student trains with: changes of the sparse memory, and whether blocks are chosen by a learned selector."""

    memory: dict[str, Any]
    learned_selector: bool = True


STUDENTS = {
    "dense": StudentKind(memory={"kind": "full"}, learned_selector=False),
    "sparse": StudentKind(memory={}),
    "mean-pooled": StudentKind(memory={}, learned_selector=False),
    "without-persistent": StudentKind(memory={"persistent_blocks": 0}),
    "without-local-sparsity": StudentKind(memory={"density": 1.0}),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A student and the memory it is judged with, as changes of the one it trained with."""

    student: str
    memory: dict[str, Any] = field(default_factory=dict)

    def adapt_memory(self, sparse: MemoryConfig) -> MemoryConfig:
        return replace(sparse, **{**STUDENTS[self.student].memory, **self.memory})


VARIANTS = {
    "dense": Variant(student="dense"),
    "dense-absolute": Variant(student="dense", memory={"positions": "absolute"}),
    "dense-window": Variant(student="dense", memory={"kind": "window"}),
    "training-free": Variant(student="dense", memory={"kind": "sparse"}),
    "sparse": Variant(student="sparse"),
    "mean-pooled": Variant(student="mean-pooled"),
    "without-persistent": Variant(student="without-persistent"),
    "without-local-sparsity": Variant(student="without-local-sparsity"),
}


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """A plan of trainings: the base model, the memory, and the stages that every student goes through.

    Args:
        model: the base model, an embedded one's name or a folder.
        memory: the sparse memory; every student's differs from it in one thing.
        selector_weight: weight of the learned selector's distillation loss, in every stage that trains one.
        teacher: stage that makes a bidirectional teacher of the base model; None: the causal base model is the teacher.
        start: stage that prepares the base model for each student's memory; None: students are distilled right away.
        long: long tuning of every student after its distillation; None for none.
    """

    memory: MemoryConfig
    model: str = "tiny"
    seed: int = 0
    selector_weight: float = 0.1
    teacher: StageSettings | None = None
    start: StageSettings | None = None
    student: StageSettings
    long: StageSettings | None = None

    def __post_init__(self) -> None:
        if self.memory.kind != "sparse" or self.memory.positions != "relative":
            raise ConfigError("memory: needs kind sparse and positions relative, which the variants change")
        if self.memory.density == 1 or not self.memory.persistent_blocks:
            raise ConfigError(
                "memory: density must be below 1 and persistent_blocks not 0, or two ablations change nothing"
            )
        if self.selector_weight <= 0:
            raise ConfigError(f"selector_weight: must be positive, got {self.selector_weight}")


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run of a stage: `function(config, folder)` as `sparse-forcing train` calls it; `parents` come before it."""

    folder: Path
    parents: tuple[Training, ...]
    config: Any
    function: Callable[[Any, Path], int]

    @property
    def model(self) -> Path:
        """The trained model, once the run is complete."""
        return self.folder / "pipeline"

    def complete(self) -> bool:
        return (self.model / MANIFEST).is_file()

    def missing(self) -> Iterator[Training]:
        """What is still to be trained for this one, itself last: nothing leads to a model that is there."""
        if not self.complete():
            for parent in self.parents:
                yield from parent.missing()
            yield self

    def ready(self) -> bool:
        return all(parent.complete() for parent in self.parents)

    def run(self) -> int:
        """Train, or go on; returns 0, or 143 after SIGTERM."""
        print(f"training {self.folder.name}", file=sys.stderr, flush=True)
        return self.function(self.config, self.folder)


def hash_settings(settings: Any) -> str:
    """Eight hex digits for a file's name that change with any of the settings (plain data)."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def plan_trainings(plan: TrainingPlan, students: Sequence[str], out: Path) -> dict[str, list[Training]]:
    """The runs that lead to each student, in order. Nothing is trained here.

    Raises:
        ConfigError, WeightsError: a setting of any stage, or the base model, cannot be used.
    """
    base = find_model(plan.model)
    make = _Planner(plan, out, base)
    if plan.teacher is None:
        return {name: list(make.student(name, base)) for name in students}
    teacher = make.training("teacher", "forcing", plan.teacher, base, memory=None)
    return {name: [teacher, *make.student(name, teacher)] for name in students}


class _Planner:
    """Builds the runs of a plan and checks them against the base model."""

    def __init__(self, plan: TrainingPlan, out: Path, base: Path) -> None:
        self.plan, self.out, self.base = plan, out, base
        self.base_hash = model_hash(base)
        self.horizon = horizon_frames(base)
        for variant in VARIANTS.values():
            check_memory(base, variant.adapt_memory(plan.memory))

    def student(self, name: str, teacher: Path | Training) -> Iterator[Training]:
        """Causal start, distillation and long tuning of one student."""
        plan, kind = self.plan, STUDENTS[name]
        settings: dict[str, Any] = {
            "memory": replace(plan.memory, **kind.memory),
            "learned_selector": kind.learned_selector,
            "selector_weight": plan.selector_weight if kind.learned_selector else 0.0,
        }
        start: Path | Training = self.base
        if plan.start is not None:
            yield (start := self.training(f"start-{name}", "forcing", plan.start, self.base, **settings))
        yield (last := self.training(f"student-{name}", "distill", plan.student, start, teacher=teacher, **settings))
        if plan.long is not None:
            yield self.training(f"long-{name}", "distill", plan.long, last, teacher=teacher, **settings)

    def training(
        self,
        name: str,
        stage: str,
        settings: StageSettings,
        model: Path | Training,
        *,
        teacher: Path | Training | None = None,
        **changes: Any,
    ) -> Training:
        path = CONFIGS / settings.config
        try:
            config, function = load_stage(stage, path, [*settings.set, f"loop.steps={settings.steps}"])
            self._check_horizon(config)
            self._check_teacher(config, teacher)
        except ConfigError as error:
            raise ConfigError(f"{name.partition('-')[0]}: {error}") from error
        parents = {"model": model} | ({"teacher": teacher} if teacher else {})
        paths = {key: str(parent.model if isinstance(parent, Training) else parent) for key, parent in parents.items()}
        config = replace(config, **paths, **changes, loop=replace(config.loop, seed=self.plan.seed))
        names = {key: p.folder.name if isinstance(p, Training) else self.base_hash for key, p in parents.items()}
        folder = self.out / f"{name}-{hash_settings({**to_plain(config), **names})}"
        trained = tuple(parent for parent in parents.values() if isinstance(parent, Training))
        return Training(folder=folder, parents=trained, config=config, function=function)

    def _check_horizon(self, config: Any) -> None:
        for name, frames in (
            ("rollout_frames", getattr(config, "rollout_frames", None)),
            ("data.latent_frames", config.data.latent_frames),
        ):
            if frames not in (None, self.horizon):
                raise ConfigError(
                    f"{name}: {frames} latent frames, but horizons are counted in the model's clips of {self.horizon}"
                )

    @staticmethod
    def _check_teacher(config: Any, teacher: Path | Training | None) -> None:
        causal = teacher is not None and config.score.causal_window is not None
        if causal and isinstance(teacher, Training):
            raise ConfigError(
                "set: score.causal_window is for the base model as teacher; the trained one is bidirectional"
            )
        if isinstance(teacher, Path) and not causal:
            raise ConfigError("set: the base model as teacher is causal and needs score.causal_window")


def horizon_frames(model: Path) -> int:
    """Latent frames of a model's default clip."""
    geometry = VideoGeometry.of(load_autoencoder(model), _transformer_config(model))
    return geometry.latent_frames(read_defaults(model).num_frames)


def check_memory(model: Path, memory: MemoryConfig) -> None:
    """Raise ConfigError when a memory does not fit a model's chunks."""
    geometry = MemoryGeometry.of(_transformer_config(model), 1, 1)
    make_memory(memory, geometry).begin_chunk(geometry.chunk_frames)


def _transformer_config(model: Path) -> dict[str, Any]:
    return read_json(model / "transformer" / "config.json")
