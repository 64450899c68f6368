"""Options of the benchmarks: one field for each flag of `sparse-forcing bench`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparse_forcing.errors import ConfigError
from sparse_forcing.scenes.worlds.config import KINDS, WorldConfig

MAX_SEED = 2**31 - 1  # each prompt has a seed of its own, a hundred thousand apart
MAX_COUNT = 1_000_000  # of whatever a benchmark makes; more is a number typed by mistake
_COUNTS = ("repeats", "prompts", "batch_size", "size", "count", "num_frames", "height", "width")


def _check_bounds(config: object) -> None:
    """Raise ConfigError for a count or seed that nothing can be made of."""
    bounds = {
        **dict.fromkeys(_COUNTS, (1, MAX_COUNT)),
        "chunks": (0, MAX_COUNT),
        "seed": (0, MAX_SEED),
        "num_inference_steps": (1, 1000),
    }
    for name, (low, high) in bounds.items():
        value = getattr(config, name, None)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"--{name.replace('_', '-')}: must be between {low} and {high}, got {value!s:.40}")


@dataclass(frozen=True, kw_only=True)
class AttentionBenchConfig:
    """Options of `bench attention`, the arguments of `bench_attention.run`."""

    quick: bool = False
    repeats: int = 7
    device: str | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        _check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class JudgedBenchConfig:
    """Options that `bench rollout` and `bench change` have in common.

    prompts: held-out captions, or changes of such. memories: names of `memory_variants`. batch_size: how many are made
    together. device: "auto" is the GPU where there is one. output: folder of the table and its JSON.
    """

    model: str = "tiny"
    device: str = "auto"
    prompts: int = 200
    memories: tuple[str, ...] = ("full", "window", "sink", "sparse")
    batch_size: int = 20
    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        _check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class ChangeBenchConfig(JudgedBenchConfig):
    """Options of `bench change`.

    recache: measure each memory that can write its window again with the new prompt a second time, doing so.
    """

    recache: bool = False


@dataclass(frozen=True, kw_only=True)
class RolloutBenchConfig(JudgedBenchConfig):
    """Options of `bench rollout`.

    objects: 1 or 2 in each. horizons: multiples of the default clip to judge. size: pixels
    to the side.
    """

    size: int | None = None
    objects: int = 1
    horizons: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objects not in (1, 2):
            raise ConfigError(f"--objects: must be 1 or 2, got {self.objects}")
        if not all(1 <= horizon <= MAX_COUNT for horizon in self.horizons):
            raise ConfigError(f"--horizons: must be between 1 and {MAX_COUNT}, got {self.horizons!s:.40}")


@dataclass(frozen=True, kw_only=True)
class RecallBenchConfig:
    """Options of `bench recall`.

    worlds: kinds of worlds. gaps: in windows of the default memory. grounds: kinds of ground; by_ground: each in
    a cell of its own. count: worlds in a cell. num_frames: pixel frames of a world; the gap and 64 more where None.
    size: pixels to the side; the model's where None. split: of the looks that return. memories: in words
    (sparse_forcing.memory.config). positions: of all of them.
    """

    model: str = ""
    device: str = "auto"
    worlds: tuple[str, ...] = ("revisit", "reappear")
    gaps: tuple[float, ...] = (0.5, 1.0, 2.0)
    grounds: tuple[str, ...] = ("smooth", "striped", "textured")
    by_ground: bool = False
    count: int = 200
    num_frames: int | None = None
    size: int | None = None
    split: str = "train"
    memories: tuple[str, ...] = ("full", "window", "sparse")
    positions: Literal["absolute", "relative"] | None = None
    batch_size: int = 16
    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        _check_bounds(self)
        if not all(0 < gap < 1000 for gap in self.gaps) or not self.gaps:
            raise ConfigError(f"--gaps: must be windows above 0, got {self.gaps}")
        WorldConfig(grounds=self.grounds, split=self.split)
        unknown = [kind for kind in self.worlds if kind not in KINDS]
        if unknown or not self.worlds:
            raise ConfigError(f"--worlds: choose from {', '.join(KINDS)}, got {' '.join(self.worlds)!r}")


@dataclass(frozen=True, kw_only=True)
class StreamBenchConfig:
    """Options of `bench stream`.

    model_size: a published size or an embedded model's; its weights are not read. height, width: pixels; the model's
    default where None. chunks: length of each rollout; 0 for the projection alone. memories: in words
    (sparse_forcing.memory.config), which take turns. device, dtype: the accelerator and bfloat16 where there is one,
    else the CPU and float32. decode: time the autoencoder, too. cuda_graphs: replay passes; None: on a CUDA device.
    output: folder of table, plot and JSON.
    """

    model_size: str = "wan-1.3b"
    height: int | None = None
    width: int | None = None
    chunks: int = 12
    memories: tuple[str, ...] = ("full", "sparse")
    num_inference_steps: int = 4
    seed: int = 0
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    decode: bool = False
    cuda_graphs: bool | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        _check_bounds(self)
