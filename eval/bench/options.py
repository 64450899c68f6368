"""Options of the benchmarks: one field for each flag of `sparse-forcing bench`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparse_forcing.errors import ConfigError
from sparse_forcing.scenes.worlds.config import KINDS, WorldConfig

_MAX_SIDE = 16_384  # pixels of a picture: that of sparse_forcing/media/container.py, which is too heavy to import here
_BOUNDS = {
    "repeats": (1, 10_000), "prompts": (1, 100_000), "batch_size": (1, 10_000), "count": (1, 100_000),
    "num_frames": (1, 100_000), "chunks": (1, 100_000), "height": (1, _MAX_SIDE), "width": (1, _MAX_SIDE),
    "size": (1, _MAX_SIDE), "horizons": (1, 10_000), "num_inference_steps": (1, 1000), "seed": (0, 2**31 - 1),
}  # fmt: skip


def _check_bounds(config: object) -> None:
    """Raise ConfigError for a number that no benchmark can mean: found out now and not after hours, or at no end."""
    for name, (least, most) in _BOUNDS.items():
        given = getattr(config, name, None)
        for value in given if isinstance(given, tuple) else [] if given is None else [given]:
            if not least <= value <= most:
                raise ConfigError(f"--{name.replace('_', '-')}: must be between {least} and {most}, got {value}")


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
            raise ConfigError(f"objects: must be 1 or 2, got {self.objects}")


@dataclass(frozen=True, kw_only=True)
class RecallBenchConfig:
    """Options of `bench recall`.

    worlds: kinds of worlds. gaps: in windows of the default memory. grounds: kinds of ground; by_ground: each in
    a cell of its own. count: worlds in a cell. num_frames: pixel frames of a world; the gap and 64 more where None.
    split: of the looks that return. memories: in words (sparse_forcing.memory.config). positions: of all of them.
    """

    model: str = ""
    device: str = "auto"
    worlds: tuple[str, ...] = ("revisit", "reappear")
    gaps: tuple[float, ...] = (0.5, 1.0, 2.0)
    grounds: tuple[str, ...] = ("smooth", "striped", "textured")
    by_ground: bool = False
    count: int = 200
    num_frames: int | None = None
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
    default where None. chunks: length of each rollout. memories: in words (sparse_forcing.memory.config), which take
    turns. device, dtype: the accelerator and bfloat16 where there is one, else the CPU and float32. decode: time the
    autoencoder, too. cuda_graphs: replay passes; None: on a CUDA device. output: folder of table, plot and JSON.
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
