"""Measure attention (correctness first), long rollouts, prompts that change, or the speed of a size; last line JSON."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields

from sparse_forcing.cli.flags import Parser, add_config_flags, read_config
from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.bench.options import (
    AttentionBenchConfig,
    ChangeBenchConfig,
    RecallBenchConfig,
    RolloutBenchConfig,
    StreamBenchConfig,
)
from sparse_forcing.inputs import check_targets, model_folders

CONFIGS: dict[str, type] = {
    "attention": AttentionBenchConfig,
    "rollout": RolloutBenchConfig,
    "change": ChangeBenchConfig,
    "recall": RecallBenchConfig,
    "stream": StreamBenchConfig,
}
ATTENTION_FLAGS = {
    "quick": "attention: the first shape and its forward only",
    "repeats": "attention: timed runs of everything (default: 7)",
    "device": "torch device (default: the accelerator when there is one)",
}
ROLLOUT_FLAGS = {
    "model": "rollout, change, recall: embedded model or folder (default: tiny; recall: none)",
    "prompts": "rollout, change: held-out prompts (default: 200)",
    "size": "rollout, recall: pixels to the side (default: the model's)",
    "objects": "rollout: objects in a scene, 1 or 2 (default: 1)",
    "horizons": "rollout: multiples of the default clip to judge (default: 1)",
    "memories": "memories to compare (default: full window sink sparse; stream: full sparse); recall, stream: in "
    "words, as window:8 or sparse:4,1,16,paper",
    "batch_size": "rollout, change, recall: videos generated together (default: 20; recall: 16)",
    "seed": "of prompts, worlds, weights and noise (default: 0)",
    "num_inference_steps": "denoising steps per chunk (default: the model's; stream: 4)",
    "guidance_scale": "rollout, change, recall: guidance (default: the model's)",
}
CHANGE_FLAGS = {"recache": "change: also with the window written again with the new prompt (window, sink, sparse)"}
RECALL_FLAGS = {
    "worlds": "recall: kinds of worlds (default: revisit reappear)",
    "gaps": "recall: how long what returns is out of sight, in windows (default: 0.5 1 2)",
    "grounds": "recall: kinds of ground (default: smooth striped textured)",
    "by_ground": "recall: each ground in a cell of its own",
    "count": "recall: worlds in a cell (default: 200)",
    "num_frames": "recall: pixel frames of a world (default: the gap and 64 more)",
    "split": "recall: of the looks that return, train or heldout (default: train)",
    "positions": "recall: absolute or relative (default: the model's)",
}
STREAM_FLAGS = {
    "model_size": "stream: wan-1.3b, wan-14b, tiny or tiny-base, with random weights (default: wan-1.3b)",
    "height": "stream: pixel rows (default: the model's, 480 for Wan)",
    "width": "stream: pixel columns (default: the model's, 832 for Wan)",
    "chunks": "stream: length of each rollout in chunks (default: 12; 0: only what a GPU is projected to take)",
    "dtype": "stream: of weights and arithmetic (default: bfloat16, float32 on a CPU)",
    "decode": "stream: also time the autoencoder, with random weights",
    "cuda_graphs": "stream: replay passes as CUDA graphs (default: on a CUDA GPU)",
}


def add_arguments(parser: Parser) -> None:
    parser.add_argument("target", metavar="WHAT", choices=CONFIGS, help=f"one of: {', '.join(CONFIGS)}")
    add_config_flags(parser, AttentionBenchConfig, ATTENTION_FLAGS)
    add_config_flags(parser, RolloutBenchConfig, ROLLOUT_FLAGS)
    add_config_flags(parser, ChangeBenchConfig, CHANGE_FLAGS)
    add_config_flags(parser, RecallBenchConfig, RECALL_FLAGS)
    add_config_flags(parser, StreamBenchConfig, STREAM_FLAGS)
    add_config_flags(parser, RolloutBenchConfig, {"output": "folder for tables and plots"})


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns its exit code. A flag of another benchmark is an error, not ignored."""
    cls = CONFIGS[arguments.target]
    own = {field.name for field in fields(cls)} | {"target", "command"}
    known = {*ATTENTION_FLAGS, *ROLLOUT_FLAGS, *CHANGE_FLAGS, *RECALL_FLAGS, *STREAM_FLAGS}
    foreign = [name for name in vars(arguments) if name in known and name not in own]
    if foreign:
        raise ConfigError(f"--{foreign[0].replace('_', '-')} has no effect on bench {arguments.target}; leave it out")
    config: AttentionBenchConfig | RolloutBenchConfig | ChangeBenchConfig | RecallBenchConfig | StreamBenchConfig
    config = read_config(cls, arguments)
    if config.output is not None:
        check_targets([], [], sealed=model_folders([getattr(config, "model", "")]), added_to=[config.output])
    if isinstance(config, RolloutBenchConfig):
        from sparse_forcing.eval.bench import rollout as bench_rollout

        return bench_rollout.run(config)
    if isinstance(config, ChangeBenchConfig):
        from sparse_forcing.eval.bench import change as bench_change

        return bench_change.run(config)
    if isinstance(config, RecallBenchConfig):
        from sparse_forcing.eval.bench import recall as bench_recall

        return bench_recall.run(config)
    if isinstance(config, StreamBenchConfig):
        from sparse_forcing.eval.bench import stream as bench_stream
        from sparse_forcing.model_folder.sizes import WAN

        return bench_stream.run(config, {f"wan-{size}": changes for size, changes in WAN.items()})
    from sparse_forcing.eval.bench import attention as bench_attention

    return bench_attention.run(**asdict(config))
