"""Measure attention (correctness against float64 first, then interleaved timings) or long rollouts; last line JSON."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields

from sparse_forcing.cli.flags import add_config_flags, read_config
from sparse_forcing.errors import ConfigError
from sparse_forcing.eval.bench_options import AttentionBenchConfig, RolloutBenchConfig

CONFIGS: dict[str, type] = {"attention": AttentionBenchConfig, "rollout": RolloutBenchConfig}
ATTENTION_FLAGS = {
    "quick": "attention: the first shape and its forward only",
    "repeats": "attention: timed runs of everything (default: 7)",
    "device": "attention: torch device (default: the accelerator when there is one)",
}
ROLLOUT_FLAGS = {
    "model": "rollout: embedded model or folder (default: tiny)",
    "prompts": "rollout: held-out prompts (default: 200)",
    "objects": "rollout: objects in a scene, 1 or 2 (default: 1)",
    "horizons": "rollout: multiples of the default clip to judge (default: 1)",
    "memories": "rollout: memories to compare (default: full window sink sparse)",
    "batch_size": "rollout: videos generated together (default: 20)",
    "seed": "rollout: of prompts and noise (default: 0)",
    "num_inference_steps": "rollout: denoising steps per chunk (default: the model's)",
    "guidance_scale": "rollout: guidance (default: the model's)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="WHAT", choices=CONFIGS, help=f"one of: {', '.join(CONFIGS)}")
    add_config_flags(parser, AttentionBenchConfig, ATTENTION_FLAGS)
    add_config_flags(parser, RolloutBenchConfig, ROLLOUT_FLAGS)
    add_config_flags(parser, RolloutBenchConfig, {"output": "folder for tables and plots"})


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns its exit code. A flag of the other benchmark is an error, not ignored."""
    cls = CONFIGS[arguments.target]
    own = {field.name for field in fields(cls)} | {"target", "command"}
    foreign = [name for name in vars(arguments) if name in {*ATTENTION_FLAGS, *ROLLOUT_FLAGS} and name not in own]
    if foreign:
        raise ConfigError(f"--{foreign[0].replace('_', '-')} has no effect on bench {arguments.target}; leave it out")
    config: AttentionBenchConfig | RolloutBenchConfig = read_config(cls, arguments)
    if isinstance(config, RolloutBenchConfig):
        from sparse_forcing.eval import bench_rollout

        return bench_rollout.run(config)
    from sparse_forcing.eval import bench_attention

    return bench_attention.run(**asdict(config))
