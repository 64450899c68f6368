"""From prompts to video files: what `sparse-forcing generate` does, as functions.

Jobs (sampling/generation/jobs.py: names, checks, nothing heavy) -> load the pipeline, check what depends on it
(sampling/generation/settings.py) -> for every job: stream chunks into a temporary file, rename, then write the sidecar.
Every job has its own seed, so its frames depend neither on the other jobs nor on how they are spread over processes.
Importing this module does not import torch.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_forcing.config import to_plain
from sparse_forcing.devices import resolve_device
from sparse_forcing.files import (
    atomic_write_json,
    check_writable,
    sweep_temporaries,
    without_empty_folders,
)
from sparse_forcing.launch import ALONE, Launch
from sparse_forcing.sampling.generation.checkpoints import find_checkpoint, remove_checkpoint
from sparse_forcing.sampling.generation.clip import Clip
from sparse_forcing.sampling.generation.jobs import GenerateConfig, Job
from sparse_forcing.sampling.generation.outputs import (
    check_inputs,
    check_sidecar,
    is_finished,
    output_folders,
)
from sparse_forcing.sampling.generation.paths import checkpoint_folder
from sparse_forcing.sampling.generation.settings import (
    Settings,
    choose_defaults,
    chunk_remarks,
    explain_out_of_memory,
    resolve_settings,
    stream_arguments,
)
from sparse_forcing.shards import hold_shard
from sparse_forcing.threads import limit_threads
from sparse_forcing.versions import list_versions

if TYPE_CHECKING:
    from sparse_forcing.sampling.pipeline import SparseForcingPipeline


class Progress:
    """What a caller may watch; every method may be left as it is."""

    def note(self, message: str) -> None: ...
    def begin(self, job: Job, number: int, total: int) -> None: ...
    def frames(self, done: int, target: int) -> None: ...
    def end(self) -> None: ...


def generate(
    config: GenerateConfig, jobs: Sequence[Job], progress: Progress | None = None, launch: Launch = ALONE
) -> Iterator[dict[str, Any]]:
    """Generate every job; yields its sidecar record (and `path`) as soon as its files are complete.

    Args:
        launch: the processes that share the jobs; each yields its own.

    Raises:
        SparseForcingError: bad settings, weights or output; all that can be known before loading is checked before.
    """
    if not jobs:
        return
    progress = Progress() if progress is None or launch.follows else progress
    folders = output_folders(config, jobs)
    waiting = [job for job in jobs if not (config.skip_existing and is_finished(job))]
    check_inputs(config, waiting)
    with without_empty_folders([*folders, *(map(checkpoint_folder, jobs) if config.checkpoints else ())]):
        for folder in folders:
            check_writable(folder, folder=True)
        with launch.hold(lambda: hold_shard(config.output, config.shard)):
            waiting = launch.from_first(lambda: _select_waiting_jobs(config, jobs, folders, progress))
            if own := launch.share(waiting):
                yield from _generate_all(config, own, progress, shown=len(jobs), launch=launch)
            launch.wait()
            if config.grid is not None and launch.number == 0:
                from sparse_forcing.media.grid import write_grid

                write_grid([job.video for job in jobs], config.grid)
                progress.note(f"{config.grid}: {len(jobs)} videos side by side")


def _select_waiting_jobs(
    config: GenerateConfig, jobs: Sequence[Job], folders: Sequence[Path], progress: Progress
) -> list[Job]:
    """The jobs that are to be done, once nobody else writes there."""
    for folder in folders:
        sweep_temporaries(folder)
    waiting = [job for job in jobs if not (config.skip_existing and is_finished(job))]
    check_inputs(config, waiting)  # another run may have moved files meanwhile
    for job in waiting:
        check_sidecar(job)
    if len(waiting) < len(jobs):
        progress.note(f"{len(jobs) - len(waiting)} of {len(jobs)} videos exist already")
    for job in set(jobs).difference(waiting):
        remove_checkpoint(job)
    return waiting


def _generate_all(
    config: GenerateConfig, jobs: Sequence[Job], progress: Progress, *, shown: int, launch: Launch
) -> Iterator[dict[str, Any]]:
    """`shown`: videos in the grid, those that exist already among them."""
    from sparse_forcing.memory.retention import find_rule
    from sparse_forcing.sampling.generation.conditioning import Starts
    from sparse_forcing.sampling.generation.together import check_launch, follow_video, join_processes

    if config.retention is not None:  # before weights are read
        find_rule(config.retention)
    if config.sequence_parallel:
        check_launch(config, launch)
    starts = Starts(config, jobs, progress.note)
    for remark in chunk_remarks(choose_defaults(config)):
        progress.note(f"warning: {remark}")
    if too_small := _shortage(config):
        progress.note(f"warning: {too_small}")
    began = time.perf_counter()
    pipe = load_pipeline(config, [text for job in jobs for text in job.texts(config)])
    loaded = time.perf_counter() - began
    settings = resolve_settings(config, pipe)
    if config.sequence_parallel:
        join_processes(pipe)
    if config.grid is not None:
        from sparse_forcing.media.grid import check_grid

        height, width = settings.height * settings.scale, settings.width * settings.scale
        check_grid(config.grid, shown, settings.num_frames, height, width)
    for job in jobs:  # before the first is made
        resolve_settings(job.config(config), pipe)
    with limit_threads(lambda: pipe.pass_operations(settings.height, settings.width)):
        for number, job in enumerate(jobs, 1):
            own = job.config(config)
            settings = resolve_settings(own, pipe)
            given = starts.arguments(own, settings, pipe)
            if job.negative_prompt is not None:
                given["negative_prompt"] = job.negative_prompt
            if launch.follows:
                follow_video(pipe, own, settings, job, given)
                continue
            progress.begin(job, number, len(jobs))
            record = generate_video(pipe, own, settings, job, progress, given, model_load_seconds=loaded)
            progress.end()
            yield record


def _shortage(config: GenerateConfig) -> str | None:
    """What to say before a model is loaded onto a device that is too small for the video."""
    from sparse_forcing.sampling.generation.preflight import answer, memory_limit, outline

    device = resolve_device(config.device)
    if config.sequence_parallel or (device == "cpu" and choose_defaults(config).vae != "wan"):
        return None  # one process alone is counted; an embedded model is small for any CPU, and a second is long for it
    return answer(config, outline(config), device, memory_limit(device)).remark


def load_pipeline(config: GenerateConfig, prompts: Sequence[str] | None = None) -> SparseForcingPipeline:
    """The pipeline of `config.model`, on its device; without umT5 where all `prompts` of the run are known. Raises
    ConfigError or WeightsError."""
    import torch

    from sparse_forcing.model_folder.folder import find_model, usual_dtype
    from sparse_forcing.sampling.generation.placement import check_placement, place
    from sparse_forcing.sampling.graphs import check_compiler, check_cuda_graphs
    from sparse_forcing.sampling.pipeline import SparseForcingPipeline

    device = resolve_device(config.device)
    text_encoder_device = resolve_device(
        config.device if config.text_encoder_device is None else config.text_encoder_device, "--text-encoder-device"
    )
    check_cuda_graphs(torch.device(device), config.cuda_graphs)
    if config.compile:
        check_compiler(torch.device(device))
    defaults = choose_defaults(config)
    check_placement(config, defaults, device)
    dtype = getattr(torch, config.dtype) if config.dtype else usual_dtype(find_model(config.model), device)
    pipe = SparseForcingPipeline.from_pretrained(
        config.model,
        torch_dtype=dtype,
        prompts=None if prompts is None else [*prompts, defaults.negative_prompt],
        prompt_cache=config.prompt_cache,
        text_encoder_device=text_encoder_device,
        weights=config.weights,
    ).with_defaults(defaults)
    if config.compile:
        pipe.transformer.compile()
    place(pipe, config, device, text_encoder_device)
    return pipe


def generate_video(
    pipe: SparseForcingPipeline,
    config: GenerateConfig,
    settings: Settings,
    job: Job,
    progress: Progress,
    given: Mapping[str, Any],
    *,
    model_load_seconds: float,
) -> dict[str, Any]:
    """Stream one video into its file and write its sidecar; returns the sidecar. Nothing is left behind on failure.

    `config` is the job's (`Job.config`); `given`: further arguments of `pipe.stream`, what the video starts from.
    """
    described = _describe_run(pipe, config, settings, job)
    checkpoints, begun = find_checkpoint(config, settings, job, pipe, described, progress.note)
    keep_in = None if checkpoints is None else checkpoints.folder
    clip = Clip(config, settings, job, pipe.fps, keep_in=keep_in, begun=begun)
    resumed = None if begun is None else begun.stream
    with explain_out_of_memory(settings, config), _collect_warnings(progress) as messages, clip:
        for chunk in pipe.stream(job.prompt, **stream_arguments(config, settings, job), resumed=resumed, **given):
            clip.add(chunk)
            progress.frames(clip.written, settings.num_frames)
            if checkpoints is not None and clip.written < settings.num_frames and checkpoints.is_due(chunk):
                checkpoints.save(chunk, clip.state(), clip.tails())
    if clip.trimmed:
        progress.note(f"{clip.written} frames do not fill whole chunks: {clip.trimmed} more were made and cut off")
    record = {
        **described,
        **clip.summary(),
        "model_load_seconds": model_load_seconds,
        "warnings": messages,
    }
    atomic_write_json(job.sidecar, record)
    remove_checkpoint(job)
    return record | {"path": str(job.video)}


def _describe_run(pipe: SparseForcingPipeline, config: GenerateConfig, settings: Settings, job: Job) -> dict[str, Any]:
    """What the sidecar says of what was asked for and what it was made with."""
    return {
        "video": job.video.name,
        "prompt": job.prompt,
        "original_prompt": job.original_prompt,
        "prompt_changes": [
            {"frame": frame, "seconds": frame / pipe.fps, "prompt": prompt}
            for frame, prompt in settings.prompt_changes.items()
        ],
        "index": job.index,
        "seed": job.seed,
        "model": config.model,
        "weights_sha256": pipe.weights_sha256,
        "versions": list_versions(),
        "settings": {
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            "negative_prompt": pipe.defaults.negative_prompt if job.negative_prompt is None else job.negative_prompt,
            "preset": pipe.defaults.preset,
            "sampler": pipe.defaults.sampler.kind,
            "shift": pipe.defaults.sampler.shift,
            "chunk_frames": None if pipe.geometry.whole_video else pipe.geometry.chunk_frames,
            "device": str(pipe.device),
            "text_encoder_device": config.text_encoder_device,
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "weights": config.weights,
            "offload": config.offload,
            "tiny_vae": to_plain(config.tiny_vae),
            "tiled_decoding": config.tiled_decoding,
            "sequence_parallel": config.sequence_parallel,
            "memory": to_plain(settings.memory),
            "recache": config.recache,
            "image": to_plain(config.image),
            "video": to_plain(config.video),
        },
    }


@contextmanager
def _collect_warnings(progress: Progress) -> Iterator[list[str]]:
    """Show once what the model warns of (a prompt cut at the token limit, unknown words); keep it for the sidecar."""
    messages: list[str] = []

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if category is not UserWarning:
            shown(message, category, *where)
        elif str(message) not in messages:
            messages.append(str(message))
            progress.note(f"warning: {message}")

    with warnings.catch_warnings():
        shown = warnings.showwarning
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield messages
