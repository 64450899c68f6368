"""Measuring videos one by one: decode, measure, write the record, forget. What is recorded is never measured again."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from sparse_forcing.errors import ConfigError, SparseForcingError, VideoError
from sparse_forcing.eval.measure import measure_view
from sparse_forcing.eval.measuring.failures import shorten
from sparse_forcing.eval.measuring.kept import FeatureStore, load_record, save_record
from sparse_forcing.eval.measuring.manifest import Entry
from sparse_forcing.eval.measuring.registry import Metric, suite_metrics
from sparse_forcing.eval.measuring.resources import Resources
from sparse_forcing.eval.measuring.returns import write_returns
from sparse_forcing.eval.measuring.view import open_clip
from sparse_forcing.eval.options import EvaluateConfig
from sparse_forcing.files import sha256_file

RECORD_VERSION = 3  # raised when the layout of a record changes
Record = dict[str, Any]


class Runner:
    """The metrics of a suite with their networks, ready to measure one video after the other."""

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        self.resources = Resources(
            weights=config.weights,
            device=config.device,
            mode=config.mode,
            plugins=_split_pairs(config.plugins, "plugin"),
            stand_ins=_split_pairs(config.stand_ins, "stand-in"),
        )
        self.metrics: list[Metric] = []
        self.skipped: dict[str, str] = {}
        for metric in suite_metrics(config.suite, config.metrics):
            reasons = [reason for name in metric.needs if (reason := self.resources.missing(name))]
            if reasons:
                self.skipped[metric.name] = "; ".join(reasons)
            else:
                self.metrics.append(metric)
        if not self.metrics:
            reasons_text = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
            raise ConfigError(f"no metric of suite {config.suite} can be measured ({reasons_text})")
        if config.static_filter and self.resources.missing("raft"):
            raise ConfigError(f"the static filter {self.resources.missing('raft')}")
        self.store = FeatureStore(config.cache_folder)
        self.fingerprints = self._load_networks()

    def _load_networks(self) -> dict[str, str]:
        """Load every network now: a damaged weight file must end the run before the first video."""
        names = {name for metric in self.metrics for name in metric.needs}
        if self.config.static_filter:
            names.add("raft")
        for name in sorted(names):
            self.resources.network(name)
        return {name: self.resources.fingerprint(name) for name in sorted(names)}

    def record_path(self, digest: str, entry: Entry) -> Path:
        """Where the record of a video lies: by everything its numbers depend on."""
        depends = {
            "record": RECORD_VERSION,
            "video": digest,
            "text": entry.text,
            "suite": self.config.suite,
            "mode": self.config.mode,
            "static_filter": self.config.static_filter,
            "metrics": {metric.name: metric.version for metric in self.metrics},
            "networks": self.fingerprints,
        }
        if self.config.suite == "recall":
            depends["returns"] = write_returns(entry.returns)
        key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
        return self.config.cache_folder / "records" / key[:2] / f"{key}.json"

    def attempt(self, entry: Entry) -> Record:
        """The record of a video; when anything about it fails, a record whose `error` is one line."""
        base = {
            "video": str(entry.video),
            "prompt": entry.prompt,
            "original_prompt": entry.original_prompt,
            "index": entry.index,
            "seed": entry.seed,
        }
        try:
            return {**base, **self._find_record(entry)}
        except SparseForcingError as error:
            return {**base, "error": shorten(str(error))}
        except Exception as error:  # one strange file must not end a run over thousands
            return {**base, "error": shorten(f"{entry.video}: {type(error).__name__}: {error}")}

    def _find_record(self, entry: Entry) -> Record:
        try:
            path = self.record_path(sha256_file(entry.video), entry)
        except OSError as error:
            raise VideoError(f"{entry.video}: cannot be read ({error.strerror})") from error
        if (known := load_record(path)) is not None:
            return {**known, "from_cache": True}
        record, keep = self._measure(entry)
        if keep:
            save_record(path, record)
        return {**record, "from_cache": False}

    def _measure(self, entry: Entry) -> tuple[Record, bool]:
        """The record of a video, and whether it may be kept."""
        limits = {"max_frames": self.config.max_frames, "max_pixels": self.config.max_pixels}
        clip = open_clip(entry, **limits, store=self.store)
        view = clip.whole()
        content, keep = measure_view(view, self.metrics, self.resources, self.config)
        size = {"frames": len(view), "fps": clip.fps, "height": view.height, "width": view.width}
        return {"sha256": clip.sha256, **size, **content}, keep


def _split_pairs(options: tuple[str, ...], kind: str) -> Mapping[str, str]:
    pairs = [option.partition("=") for option in options]
    for name, separator, value in pairs:
        if not (name and separator and value):
            raise ConfigError(f"{kind} {name!r}: expected NAME=VALUE")
    return {name: value for name, _, value in pairs}


_runner: Runner | None = None
_owners: MutableSequence[int] = []
"""Process id of the worker that began each entry, 0 before; shared with the parent."""


def _start_worker(config: EvaluateConfig, owners: MutableSequence[int]) -> None:
    global _runner, _owners
    torch.set_num_threads(1)
    _runner, _owners = Runner(config), owners


def _work(number: int, entry: Entry) -> Record:
    assert _runner is not None, "the worker was not started"
    _owners[number] = os.getpid()
    return _runner.attempt(entry)


def measure_all(
    runner: Runner, entries: list[Entry], on_record: Callable[[Record], None] = lambda record: None
) -> list[Record]:
    """Records of all entries, in their order; `on_record` is called as each is finished."""
    workers = min(runner.config.workers, len(entries))
    finished: dict[int, Record] = {}
    for number, record in _serial(runner, entries) if workers <= 1 else _parallel(runner.config, entries, workers):
        finished[number] = record
        on_record(record)
    return [finished[number] for number in range(len(entries))]


def _serial(runner: Runner, entries: list[Entry]) -> Iterator[tuple[int, Record]]:
    for number, entry in enumerate(entries):
        yield number, runner.attempt(entry)


def _parallel(config: EvaluateConfig, entries: list[Entry], workers: int) -> Iterator[tuple[int, Record]]:
    # Spawned, not forked: threads of torch and OpenCV do not survive a fork.
    context = multiprocessing.get_context("spawn")
    owners = context.RawArray("q", len(entries))
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, _start_worker, (config, owners)) as pool:
        pending = {pool.submit(_work, number, entry): number for number, entry in enumerate(entries)}
        try:
            while pending:
                done, _ = wait(pending, config.worker_timeout, FIRST_COMPLETED)
                if not done:
                    _end(set(multiprocessing.active_children()) - others)
                    what = f"no video was finished in {config.worker_timeout:g} seconds"
                    raise ConfigError(
                        f"{what} ({_at_work(owners, entries, pending.values())}); what is measured is kept: run again "
                        "with a longer --worker-timeout, or without that video"
                    )
                for job in sorted(done, key=lambda job: job.exception() is not None):
                    yield pending[job], job.result()
                    del pending[job]
        except BrokenProcessPool as error:
            raise ConfigError(
                f"a worker process died ({_at_work(owners, entries, pending.values())}; out of memory?); what is "
                "measured is kept: run again, with fewer workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _at_work(owners: Sequence[int], entries: list[Entry], pending: Iterable[int]) -> str:
    """Which workers were at which videos, as far as they had begun."""
    begun = [f"process {owners[number]} at {entries[number].video}" for number in pending if owners[number]]
    return ", ".join(begun) or "none had begun one"


def _end(processes: set[BaseProcess]) -> None:
    """Kill workers that hang; the pool then ends and reaps them."""
    for process in processes:
        process.kill()
