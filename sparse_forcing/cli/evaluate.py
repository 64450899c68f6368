"""Judge videos: a folder, a JSONL manifest or one file, by a suite of metrics; writes JSON, CSV and an HTML report."""

from __future__ import annotations

import argparse

from sparse_forcing.cli.flags import Parser, add_config_flags, path, read_config, shard
from sparse_forcing.eval.options import EvaluateConfig

FLAGS = {
    "suite": "offline, drift and recall need no weights; vbench and vbench-long need --weights (default: offline)",
    "metrics": "only these metrics of the suite",
    "output": "folder for the results (default: evaluation-SUITE beside the target)",
    "compare": "results of earlier runs, or more videos, to compare with",
    "merge": "files that --shard wrote, of all shards: write the results of one run over all videos",
    "aggregate": "compute VBench's totals from a JSON of dimension scores, measuring nothing",
    "json": "print one JSON object instead of a table",
    "weights": "folder with weight files for the networks of VBench",
    "mode": "fix VBench's quirks, or keep them (default: strict)",
    "official_results": "take over dimensions from files that the official tool wrote",
    "plugins": "networks from other modules, NAME=MODULE:FUNCTION",
    "stand_ins": "transformers models in place of VBench's own, detector=FOLDER or captioner=FOLDER",
    "static_filter": "judge temporal flickering on static videos only (VBench's protocol)",
    "cache": "folder for resumable results of each video",
    "workers": "processes (default: 1)",
    "worker_timeout": "seconds without a finished video until hanging workers are ended (default: 3600)",
    "device": "torch device of the networks (default: cpu)",
    "max_frames": "refuse videos with more frames",
    "max_pixels": "refuse videos with more pixels over all frames",
    "strict_exit": "exit with 1 when any video or value failed, not only when all did",
    "report": "write the HTML page",
    "embed_videos": "put small videos into the page itself",
    "resamples": "bootstrap resamples of the 95 %% intervals",
}


def add_arguments(parser: Parser) -> None:
    parser.add_argument("target", metavar="TARGET", nargs="?", type=path, help="folder, manifest or video")
    add_config_flags(parser, EvaluateConfig, FLAGS)
    parser.add_argument(
        "--shard", type=shard, metavar="I/N", help="measure every N-th video from the I-th, to be merged (--merge)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; returns what `eval.evaluate.evaluate` returns."""
    config = read_config(EvaluateConfig, arguments)
    from sparse_forcing.eval.evaluate import evaluate

    return evaluate(config)
