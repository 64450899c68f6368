"""One video by all processes of a launch together (sequence parallelism): what that rules out, and who follows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparse_forcing.errors import ConfigError
from sparse_forcing.launch import Launch
from sparse_forcing.sampling.generation.jobs import GenerateConfig, Job
from sparse_forcing.sampling.generation.settings import Settings, explain_out_of_memory, stream_arguments

if TYPE_CHECKING:
    from sparse_forcing.sampling.pipeline import SparseForcingPipeline


def check_launch(config: GenerateConfig, launch: Launch) -> None:
    """Raise ConfigError, before any weights are read, where these processes cannot make a video together."""
    if launch.count == 1:
        raise ConfigError(
            "--sequence-parallel needs several processes; start them as in: torchrun --nproc-per-node 2 "
            "-m sparse_forcing generate PROMPT --sequence-parallel"
        )
    from sparse_forcing.model.sequence_parallel import check_processes
    from sparse_forcing.model_folder.sizes import model_sizes

    check_processes(model_sizes(config.model).transformer["num_attention_heads"], launch.count)


def join_processes(pipe: SparseForcingPipeline) -> None:
    """Let the processes of the launch run this pipeline's transformer together."""
    from sparse_forcing.model.sequence_parallel import SequenceParallel

    pipe.transformer.sequence_parallel = SequenceParallel.of_launch(
        pipe.transformer.config.num_attention_heads, pipe.device
    )


def follow_video(
    pipe: SparseForcingPipeline, config: GenerateConfig, settings: Settings, job: Job, given: Mapping[str, Any]
) -> None:
    """Help to make a video that the first process decodes and writes, and whose warnings it shows."""
    with explain_out_of_memory(settings, config), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in pipe.stream(job.prompt, **stream_arguments(config, settings, job), **given):
            pass
