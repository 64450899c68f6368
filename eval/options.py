"""The options of an evaluation: one field for each flag of `sparse-forcing evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from sparse_forcing.errors import ConfigError
from sparse_forcing.shards import check_shard

Suite = Literal["offline", "drift", "vbench", "vbench-long", "recall"]
Mode = Literal["strict", "vbench-compatible"]
MOST_RESAMPLES = 1_000_000
_OF_RESULTS = ("compare", "official_results")
_OF_MEASURING = (
    "suite", "metrics", "weights", "mode", "plugins", "stand_ins", "static_filter", "cache", "workers", "device",
    "max_frames", "max_pixels",
)  # fmt: skip
_KINDS: tuple[tuple[str, type | tuple[type, ...], tuple[str, ...]], ...] = (
    ("a pathlib.Path", Path, ("target", "output", "aggregate", "weights", "cache")),
    ("a tuple", (tuple, list), ("metrics", "compare", "merge", "official_results", "plugins", "stand_ins", "shard")),
    ("a whole number", int, ("workers", "max_frames", "max_pixels", "resamples")),
    ("a number", (int, float), ("worker_timeout",)),
)
_MEMBERS: dict[str, type] = {name: str for name in ("metrics", "plugins", "stand_ins")}
_MEMBERS |= {"shard": int} | {name: Path for name in ("compare", "merge", "official_results")}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Options of an evaluation; the command line has one flag for each, spelled with hyphens.

    target: folder, JSONL manifest or single video (the command's argument). Not needed with `aggregate` or `merge`.
    suite: which metrics: offline and drift need no weights; vbench and vbench-long need the user's (`weights`); recall
        compares what a manifest says returns with its first sight, with the user's DINO weights where they are given.
    metrics: names of the suite's metrics to keep.
    output: folder for results.json, videos.csv and report.html. Default: `evaluation-<suite>` beside the target.
    compare: earlier results to compare with: results.json files, folders holding one, or more videos to measure.
    shard: (i, n): measure every n-th video from the i-th on, and write their records as a file to merge.
    merge: those files, of all shards: writes what one run over all videos would.
    aggregate: a JSON of dimension scores; prints VBench's quality, semantic and total, measures nothing.
    json: print one JSON object instead of a table.
    weights: folder with the user's weight files, searched in subfolders too; default: VBENCH_CACHE_DIR, if set.
    mode: strict (fixed) or vbench-compatible (quirks kept) where VBench has quirks.
    official_results: files written by the official tool; their dimensions are taken over, named as imported.
    plugins: `name=module:function` factories for networks this package does not carry (interpolator, dreamsim, ...).
    stand_ins: folders of transformers models, `detector=FOLDER`, `captioner=FOLDER`; totals are refused with them.
    static_filter: judge temporal flickering on static videos only, at most five a prompt (VBench's protocol; RAFT).
    cache: folder of resumable per-video results and features. Default: `cache` inside the output folder.
    workers: processes. worker_timeout: seconds without a finished video after which they are given up.
    device: torch device of the networks.
    max_frames, max_pixels: bounds of one video (pixels over all its frames); memory does not depend on its length.
    strict_exit: exit 1 when any video or any of its values failed (otherwise only when all did).
    report: write the HTML page. embed_videos: put small videos into the page itself.
    resamples: bootstrap resamples of the 95 % intervals.
    """

    target: Path | None = None
    suite: Suite = "offline"
    metrics: tuple[str, ...] = ()
    output: Path | None = None
    compare: tuple[Path, ...] = ()
    shard: tuple[int, int] | None = None
    merge: tuple[Path, ...] = ()
    aggregate: Path | None = None
    json: bool = False
    weights: Path | None = None
    mode: Mode = "strict"
    official_results: tuple[Path, ...] = ()
    plugins: tuple[str, ...] = ()
    stand_ins: tuple[str, ...] = ()
    static_filter: bool = False
    cache: Path | None = None
    workers: int = 1
    worker_timeout: float = 3600.0
    device: str = "cpu"
    max_frames: int = 20_000
    max_pixels: int = 1 << 34
    strict_exit: bool = False
    report: bool = True
    embed_videos: bool = True
    resamples: int = 2000

    def __post_init__(self) -> None:
        self._check_types()
        if self.suite not in get_args(Suite):
            raise ConfigError(f"suite {self.suite!r} is unknown; choose one of {', '.join(get_args(Suite))}")
        if self.mode not in get_args(Mode):
            raise ConfigError(f"mode {self.mode!r} is unknown; choose one of {', '.join(get_args(Mode))}")
        if (self.target is not None) + (self.aggregate is not None) + bool(self.merge) != 1:
            raise ConfigError(
                "give either a folder or manifest to evaluate, or --merge SHARDS, or --aggregate SCORES.json"
            )
        if self.shard is not None:
            if len(self.shard) != 2:
                raise ConfigError(f"shard must be two whole numbers, not {self.shard!r:.60}")
            check_shard(self.shard)
            self._refuse("--shard measures a part of the videos", ("merge", "aggregate", *_OF_RESULTS))
        if self.merge:
            self._refuse("--merge measures nothing", _OF_MEASURING)
        for name in ("workers", "max_frames", "max_pixels", "resamples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.resamples > MOST_RESAMPLES:
            raise ConfigError(f"resamples may be up to {MOST_RESAMPLES}, not {self.resamples}")
        if not self.worker_timeout > 0:
            raise ConfigError(f"worker_timeout must be positive, not {self.worker_timeout}")

    def _check_types(self) -> None:
        """Refuse what a program of Python may give and the command line cannot."""
        defaults = {field.name: field.default for field in fields(self)}
        for wanted, kind, names in _KINDS:
            for name in names:
                value: Any = getattr(self, name)
                if value is None and defaults[name] is None:
                    continue
                if not isinstance(value, kind) or isinstance(value, bool):
                    raise ConfigError(f"{name} must be {wanted}, not {value!r:.60}")
                for member in getattr(self, name) if name in _MEMBERS else ():
                    if not isinstance(member, _MEMBERS[name]):
                        raise ConfigError(f"{name} must hold {_MEMBERS[name].__name__} alone, not {member!r:.60}")

    def _refuse(self, why: str, names: tuple[str, ...]) -> None:
        """Raise ConfigError for a setting that has no effect."""
        for field in fields(self):
            if field.name in names and getattr(self, field.name) != field.default:
                raise ConfigError(f"{why}; --{field.name.replace('_', '-')} has no effect with it")

    @property
    def output_folder(self) -> Path:
        """Where results go."""
        assert self.target is not None, "an aggregation writes nothing"
        return self.output or self.target.parent / f"evaluation-{self.suite}"

    @property
    def cache_folder(self) -> Path:
        """Where resumable work is kept."""
        return self.cache or self.output_folder / "cache"
