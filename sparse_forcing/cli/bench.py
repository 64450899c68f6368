"""Measure attention on this machine: correctness against float64 first, then interleaved timings; last line JSON."""

from __future__ import annotations

import argparse
from collections.abc import Callable

TARGETS = ("attention",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="WHAT", choices=TARGETS, help=f"one of: {', '.join(TARGETS)}")


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns its exit code."""
    from sparse_forcing.eval import bench_attention

    benchmarks: dict[str, Callable[[], int]] = {"attention": bench_attention.run}
    return benchmarks[arguments.target]()
