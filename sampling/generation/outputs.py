"""The files of a video: checked before anything is computed, and replaced so that no wrong pair ever lies there.

The old overlay and sidecar go first, then come the video, its overlay and its sidecar. A run that is killed between
them leaves a video without a sidecar, which `--skip-existing` takes for unfinished.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sparse_forcing.errors import ConfigError, OutputError
from sparse_forcing.files import check_target, is_file, is_folder, read_json, remove_file
from sparse_forcing.inputs import check_targets, model_folders
from sparse_forcing.sampling.generation.jobs import WRITTEN, GenerateConfig, Job
from sparse_forcing.sampling.generation.paths import (
    OVERLAY_FOLDER,
    checkpoint_folder,
    live_path,
    overlay_path,
    video_files,
)


def remove_live(job: Job) -> None:
    """Remove the file that could be watched while the video was made; a player that has it open keeps it."""
    with suppress(OSError):
        live_path(job).unlink(missing_ok=True)
        live_path(job).parent.rmdir()


def output_folders(config: GenerateConfig, jobs: Sequence[Job]) -> list[Path]:
    """The folders that files will be written to; nothing is created.

    Raises:
        OutputError: the name of a video, sidecar, overlay or grid cannot be one, or is that of a folder.
    """
    paths = [path for job in jobs for path in (job.video, job.sidecar)]
    if config.overlay:
        paths += map(overlay_path, jobs)
    if config.live:
        paths += map(live_path, jobs)
    if config.grid is not None:
        paths.append(config.grid)
    folders = [check_target(path).parent for path in paths]
    if config.checkpoints:
        folders += map(_check_checkpoint, jobs)
    return list(dict.fromkeys(folders))


def _check_checkpoint(job: Job) -> Path:
    """The folder of all checkpoints. Raises OutputError where this video's cannot be a folder in it."""
    folder = checkpoint_folder(job)
    if os.path.lexists(folder) and not is_folder(folder, OutputError):
        raise OutputError(f"cannot write into {folder}: it is a file, not a folder")
    return folder.parent


def check_inputs(config: GenerateConfig, jobs: Sequence[Job]) -> None:
    """Refuse jobs that would replace what the run reads: every file that a flag or a job names, a video's own sidecar
    and overlay with it, and the model's folder, to which nothing is added. Raises OutputError."""
    starts = dict.fromkeys([config.video, *(job.start_video for job in jobs)])
    named = [value for name, value in vars(config).items() if isinstance(value, Path) and name not in WRITTEN]
    inputs = [*named, *dict.fromkeys(path for job in jobs for path in (job.start_image, job.start_video) if path)]
    for video in starts:
        if video is not None:
            inputs += [video.with_suffix(".json"), video.parent / OVERLAY_FOLDER / video.name]
    targets = [path for job in jobs for path in video_files(job) if config.live or path != live_path(job)]
    if config.grid is not None:
        targets.append(config.grid)
    kept = [] if config.prompt_cache is None else [config.prompt_cache]
    check_targets(targets, inputs, sealed=model_folders([config.model]), added_to=kept)


def is_finished(job: Job) -> bool:
    """Whether an earlier run made this video. Raises OutputError where that cannot be seen."""
    return is_file(job.video, OutputError) and is_file(job.sidecar, OutputError)


def check_sidecar(job: Job) -> None:
    """Raises OutputError when a file that is no sidecar lies where the sidecar goes: it may be anybody's."""
    if not is_file(job.sidecar, OutputError):
        return
    try:
        record = read_json(job.sidecar)
    except ConfigError:
        record = None
    if not (isinstance(record, dict) and {"video", "prompt", "seed", "settings"} <= record.keys()):
        raise OutputError(
            f"cannot write {job.sidecar}: the file there does not belong to a video; rename it or choose another output"
        )


def remove_old(job: Job) -> None:
    """Remove the sidecar of the video that is about to be replaced, and its overlay. Raises OutputError."""
    if is_file(job.sidecar, OutputError):
        remove_file(overlay_path(job))
        remove_file(job.sidecar)
