"""Worlds as a piece of `make reproduce`: the stages that teach a model what comes back, then `bench recall`."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from sparse_forcing.config import to_plain
from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.bench import recall
from sparse_forcing.eval.bench.options import RecallBenchConfig
from sparse_forcing.model_folder.folder import find_model
from sparse_forcing.reproduction.plan import CONFIGS, StageSettings, Training, hash_settings
from sparse_forcing.training.entry import guess_stage, load_stage
from sparse_forcing.weights.manifest import model_hash


@dataclass(frozen=True, kw_only=True)
class WorldPlan:
    """A model that learns worlds, and what it is asked.

    Args:
        model: the model that the first stage goes on from, an embedded one's name or a folder.
        stages: the stages, each from what the one before it made; the kind of each is told from its file.
        bench: settings of `bench recall`, without a model and an output.
    """

    stages: tuple[StageSettings, ...]
    bench: RecallBenchConfig
    model: str = "tiny-base"

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("stages: at least one is needed")
        if self.bench.model or self.bench.output:
            raise ConfigError("bench: the model is what the stages make, and results have their place; leave both out")


def plan_world_training(plan: WorldPlan, out: Path) -> Training:
    """The last run of the stages, which names those before it. Nothing is trained here.

    Raises:
        ConfigError, WeightsError: a setting of any stage, or the model, cannot be used.
    """
    base = find_model(plan.model)
    last: Training | None = None
    for settings in plan.stages:
        path = CONFIGS / settings.config
        stage = guess_stage(path)
        config, function = load_stage(stage, path, [*settings.set, f"loop.steps={settings.steps}"])
        key = "init_from" if stage == "autoencoder" else "model"
        config = replace(config, **{key: str(last.model if last else base)})
        origin = {key: last.folder.name if last else model_hash(base)}
        folder = out / f"worlds-{stage}-{hash_settings({**to_plain(config), **origin})}"
        last = Training(folder=folder, parents=(last,) if last else (), config=config, function=function)
    assert last is not None
    return last


@dataclass(frozen=True, kw_only=True)
class WorldRecall:
    """`bench recall` of what was trained, in a folder named after its settings and the training."""

    training: Training
    bench: RecallBenchConfig
    out: Path

    @cached_property
    def folder(self) -> Path:
        return self.out / f"worlds-{hash_settings([asdict(self.bench), self.training.folder.name])}"

    def is_done(self) -> bool:
        """Whether every file is there: the bench runs in a folder of another name."""
        return self.folder.is_dir()

    def measure(self) -> int:
        partial = self.folder.with_name(f"{self.folder.name}.partial")
        recall.run(replace(self.bench, model=str(self.training.model), output=partial))
        partial.rename(self.folder)
        return 0

    def write(self, results: Path) -> None:
        """Copy table, figures and JSON to the results."""
        shutil.copytree(self.folder, results, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
