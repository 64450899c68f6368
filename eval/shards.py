"""Shards of an evaluation: a part of the videos' records as a file, and all parts' files as one run's results"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.forms import SHARD_KIND, check_shard_file
from sparse_forcing.eval.measuring.manifest import Entry
from sparse_forcing.eval.measuring.registry import suite_metrics
from sparse_forcing.eval.measuring.returns import write_returns
from sparse_forcing.eval.options import EvaluateConfig
from sparse_forcing.eval.results import RESULT_PACKAGES, Measured, build_results
from sparse_forcing.eval.run import Record, Runner
from sparse_forcing.files import atomic_write_json, read_json
from sparse_forcing.shards import MAX_SHARDS
from sparse_forcing.versions import list_versions

MAX_BYTES = 1 << 30


def shard_file(config: EvaluateConfig) -> Path:
    """Where the records of `config.shard` go."""
    assert config.shard is not None
    return config.output_folder / "shard-{}-of-{}.json".format(*config.shard)


def write_shard(runner: Runner, entries: Sequence[Entry], records: Sequence[Record]) -> Path:
    """Write the records of the shard's videos; `entries` are those of all shards. Returns the file."""
    config = runner.config
    names = [[str(entry.video), entry.text, entry.index, entry.seed, write_returns(entry.returns)] for entry in entries]
    path = shard_file(config)
    atomic_write_json(
        path,
        {
            "kind": SHARD_KIND,
            "shard": config.shard,
            "videos_in_all": len(entries),
            "same": {  # in all shards, or they are not of one run
                "target": str(config.target),
                "list of videos": hashlib.sha256(json.dumps(names).encode()).hexdigest(),
                "suite": config.suite,
                "mode": config.mode,
                "static_filter": config.static_filter,
                "metrics": {metric.name: metric.version for metric in runner.metrics},
                "networks": runner.fingerprints,
                "versions": list_versions(RESULT_PACKAGES),
            },
            "skipped": runner.skipped,
            "videos": [{key: value for key, value in record.items() if key != "from_cache"} for record in records],
        },
    )
    return path


def merge_shards(config: EvaluateConfig) -> tuple[EvaluateConfig, dict[str, Any]]:
    """The options of the run that the files in `config.merge` are the shards of, and its results.

    Raises:
        ConfigError: a file is no shard; shards overlap or are missing, or are of different runs.
    """
    found = [(path, _read(path)) for path in config.merge]
    _check_one_run(found)
    _check_complete(found)
    first = found[0][1]
    same = first["same"]
    config = replace(
        config,
        merge=(),
        target=Path(same["target"]),
        suite=same["suite"],
        mode=same["mode"],
        static_filter=same["static_filter"],
        metrics=tuple(same["metrics"]),
    )
    try:
        metrics = suite_metrics(config.suite, config.metrics)
    except ConfigError as error:
        raise ConfigError(f"{found[0][0]}: {error}") from error
    for metric in metrics:
        if metric.version != same["metrics"][metric.name]:
            raise ConfigError(f"{found[0][0]}: {metric.name} was measured by another version of it; measure again")
    records: list[Record] = [{}] * first["videos_in_all"]
    for _, shard in found:
        number, count = shard["shard"]
        records[number::count] = shard["videos"]
    measured = Measured(config=config, metrics=metrics, skipped=first["skipped"], fingerprints=same["networks"])
    return config, build_results(measured, records) | {"versions": same["versions"]}


def _read(path: Path) -> dict[str, Any]:
    expected = "a shard of an evaluation, as --shard I/N writes it"
    shard = check_shard_file(read_json(path, max_bytes=MAX_BYTES, expected=expected), path)
    number, count = shard["shard"]
    if not number < count <= MAX_SHARDS:
        raise ConfigError(f"{path}: there is no shard {number}/{count}")
    if len(shard["videos"]) != len(range(number, shard["videos_in_all"], count)):
        raise ConfigError(f"{path}: holds {len(shard['videos'])} videos, other than a shard {number}/{count}")
    return shard


def _check_one_run(found: list[tuple[Path, dict[str, Any]]]) -> None:
    path, first = found[0]
    for other_path, other in found[1:]:
        for name, value in first["same"].items():
            if other["same"].get(name) != value:
                raise ConfigError(
                    f"{path} and {other_path} are shards of different runs: {_difference(name, value, other)}"
                )
        if other["videos_in_all"] != first["videos_in_all"]:
            raise ConfigError(f"{path} and {other_path} are shards of different runs: of other numbers of videos")


def _difference(name: str, value: Any, other: dict[str, Any]) -> str:
    theirs = other["same"].get(name)
    if isinstance(value, dict) and isinstance(theirs, dict):
        keys = sorted(key for key in value.keys() | theirs.keys() if value.get(key) != theirs.get(key))
        return f"{name} differ in {', '.join(keys)}"
    return f"{name} differs" if name == "list of videos" else f"{name} is {value!r:.60} and {theirs!r:.60}"


def _check_complete(found: list[tuple[Path, dict[str, Any]]]) -> None:
    """Raise ConfigError unless every shard of one division is there once."""
    count = found[0][1]["shard"][1]
    seen: dict[int, Path] = {}
    for path, shard in found:
        number, others = shard["shard"]
        if others != count:
            raise ConfigError(f"{found[0][0]} is one of {count} shards, {path} one of {others}: they overlap")
        if number in seen:
            raise ConfigError(f"{seen[number]} and {path} are both shard {number}/{count}")
        seen[number] = path
    if missing := [number for number in range(count) if number not in seen]:
        names = ", ".join(f"{number}/{count}" for number in missing[:5])
        raise ConfigError(f"--merge: {len(missing)} of {count} shards are missing: {names}")
