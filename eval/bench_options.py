"""Options of the benchmarks: one field for each flag of `sparse-forcing bench`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparse_forcing.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AttentionBenchConfig:
    """Options of `bench attention`, the arguments of `bench_attention.run`."""

    quick: bool = False
    repeats: int = 7
    device: str | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ConfigError(f"--repeats: at least 1, got {self.repeats}")


@dataclass(frozen=True, kw_only=True)
class RolloutBenchConfig:
    """Options of `bench rollout`.

    prompts: held-out scenes. horizons: multiples of the default clip to judge. memories: names of `memory_variants`.
    objects: 1 or 2 per scene. batch_size: rollouts generated together. output: folder of the table and its JSON.
    """

    model: str = "tiny"
    prompts: int = 200
    objects: int = 1
    horizons: tuple[int, ...] = (1,)
    memories: tuple[str, ...] = ("full", "window", "sink", "sparse")
    batch_size: int = 20
    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        if self.objects not in (1, 2):
            raise ConfigError(f"objects: 1 or 2, got {self.objects}")
        if min(self.prompts, self.batch_size, *self.horizons) < 1:
            raise ConfigError("prompts, batch_size and horizons must be positive")
