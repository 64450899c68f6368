"""From prompts to video files: what `sparse-forcing generate` does, as functions.

Jobs (sampling/jobs.py: names, checks, nothing heavy) -> load the pipeline -> for every job: stream chunks into a
temporary file, rename, then write the sidecar JSON. Every job has its own seed, so its frames depend neither on the
other jobs nor on how they are spread over processes. Importing this module does not import torch.
"""

from __future__ import annotations

import dataclasses
import platform
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any

from sparse_forcing import __version__
from sparse_forcing.config import to_plain
from sparse_forcing.devices import resolve_device
from sparse_forcing.errors import ConfigError, OutputError, SparseForcingError
from sparse_forcing.files import atomic_write_json, check_writable, output_lock, sweep_temporaries
from sparse_forcing.sampling.jobs import MAX_FRAMES, MEMORY_KNOBS, GenerateConfig, Job, flag

if TYPE_CHECKING:
    import numpy as np

    from sparse_forcing.memory.config import MemoryConfig

WATCHABLE_SIDE = 256  # pictures are enlarged by a whole number up to this many pixels on the short side
OVERLAY_FOLDER = "overlay"  # apart, so that a folder of results holds nothing but results


class Progress:
    """What a caller may watch; every method may be left as it is."""

    def note(self, message: str) -> None: ...
    def begin(self, job: Job, number: int, total: int) -> None: ...
    def frames(self, done: int, target: int) -> None: ...
    def end(self) -> None: ...


def generate(config: GenerateConfig, jobs: Sequence[Job], progress: Progress | None = None) -> Iterator[dict[str, Any]]:
    """Generate every job; yields its sidecar record (and `path`) as soon as its files are complete.

    Raises:
        SparseForcingError: bad settings, weights or output; all that can be known before loading is checked before.
    """
    progress = progress or Progress()
    for folder in dict.fromkeys(path.parent for job in jobs for path in (job.video, job.sidecar)):
        check_writable(folder, folder=True)
    if config.to_file:
        check_writable(config.output)
    with output_lock(config.output):
        for folder in dict.fromkeys(job.video.parent for job in jobs):
            sweep_temporaries(folder)
        waiting = [job for job in jobs if not (config.skip_existing and job.video.exists() and job.sidecar.exists())]
        if len(waiting) < len(jobs):
            progress.note(f"{len(jobs) - len(waiting)} of {len(jobs)} videos exist already")
        if waiting:
            yield from _generate_all(config, waiting, progress)


def _generate_all(config: GenerateConfig, jobs: Sequence[Job], progress: Progress) -> Iterator[dict[str, Any]]:
    from sparse_forcing.sampling.conditioning import read_start, start_arguments

    start = read_start(config)
    began = time.perf_counter()
    pipe = load_pipeline(config)
    loaded = time.perf_counter() - began
    given = start_arguments(config, start, pipe)
    for number, job in enumerate(jobs, 1):
        progress.begin(job, number, len(jobs))
        record = generate_video(pipe, config, job, progress, given, model_load_seconds=loaded)
        progress.end()
        yield record


def load_pipeline(config: GenerateConfig) -> Any:
    """The pipeline of `config.model`, on its device. Raises ConfigError or WeightsError."""
    import torch

    from sparse_forcing.pipeline import SparseForcingPipeline

    device = resolve_device(config.device)
    dtype = getattr(torch, config.dtype) if config.dtype else None
    return SparseForcingPipeline.from_pretrained(config.model, torch_dtype=dtype).to(device)


def memory_config(config: GenerateConfig, default: MemoryConfig) -> MemoryConfig:
    """The model's default memory with what the config changes. Raises ConfigError on values that do not fit."""
    changes = {name: value for name in MEMORY_KNOBS if (value := getattr(config, name)) is not None}
    if config.memory is not None:
        changes["kind"] = config.memory
    kind = changes.get("kind", default.kind)
    for name in changes:
        if name in MEMORY_KNOBS and kind not in MEMORY_KNOBS[name]:
            raise ConfigError(
                f"{flag(name)} has no effect with the model's memory, {kind}; add --memory {MEMORY_KNOBS[name][0]}"
            )
    return dataclasses.replace(default, **changes)


def generate_video(
    pipe: Any,
    config: GenerateConfig,
    job: Job,
    progress: Progress,
    given: Mapping[str, np.ndarray],
    *,
    model_load_seconds: float,
) -> dict[str, Any]:
    """Stream one video into its file and write its sidecar; returns the sidecar. Nothing is left behind on failure.

    `given`: further arguments of `pipe.stream`, what the video starts from.
    """
    import torch

    memory = memory_config(config, pipe.default_memory)
    defaults = pipe.config
    wanted = max(1.0, config.seconds * pipe.fps) if config.seconds else config.num_frames or defaults.num_frames
    if wanted > MAX_FRAMES:
        raise ConfigError(f"--seconds {config.seconds:g} are {wanted:g} frames; at most {MAX_FRAMES} are made")
    target = round(wanted)
    guidance = defaults.sampler.guidance_scale if config.guidance_scale is None else config.guidance_scale
    clip = _Clip(config, job, pipe.fps, target)
    with _explained_out_of_memory(config, memory), _collected_warnings(progress) as messages, clip:
        stream = pipe.stream(
            job.prompt, height=config.height, width=config.width, num_frames=target,
            num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(job.seed), memory=memory, **given,
        )  # fmt: skip
        for chunk in stream:
            clip.add(chunk)
            progress.frames(clip.written, target)
    if clip.trimmed:
        progress.note(f"{clip.written} frames do not fill whole chunks: {clip.trimmed} more were made and cut off")
    record = {
        "video": job.video.name,
        "prompt": job.prompt,
        "original_prompt": job.original_prompt,
        "index": job.index,
        "seed": job.seed,
        "model": config.model,
        "weights_sha256": pipe.weights_sha256,
        "versions": versions(),
        "settings": {
            "num_inference_steps": config.num_inference_steps or defaults.sampler.steps,
            "guidance_scale": guidance,
            "device": str(pipe.device),
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "memory": to_plain(memory),
            "image": to_plain(config.image),
            "video": to_plain(config.video),
        },
        **clip.summary(),
        "model_load_seconds": model_load_seconds,
        "warnings": messages,
    }
    atomic_write_json(job.sidecar, record)
    return record | {"path": str(job.video)}


class _Clip:
    """The files of one job while its chunks arrive, and what was measured on the way."""

    def __init__(self, config: GenerateConfig, job: Job, fps: float, target: int) -> None:
        self.config, self.job, self.fps, self.target = config, job, fps, target
        self.written = self.trimmed = self.cache_bytes = 0
        self.seconds: list[float] = []
        self.decode_seconds: list[float] = []
        self.first_frame: float | None = None
        self.size: tuple[int, int, int] | None = None

    def __enter__(self) -> _Clip:
        self._stack = ExitStack().__enter__()
        self._began = time.perf_counter()
        return self

    def add(self, chunk: Any) -> None:
        """Write one chunk's frames, up to the wanted length."""
        import numpy as np

        if self.first_frame is None:
            self.first_frame = time.perf_counter() - self._began
        frames = np.asarray(chunk.frames, dtype=np.float32)
        room = min(len(frames), self.target - self.written)
        self.trimmed += len(frames) - room
        self.seconds.append(float(chunk.seconds))
        self.decode_seconds.append(float(chunk.decode_seconds))
        self.cache_bytes = max(self.cache_bytes, int(chunk.cache_bytes))
        if self.size is None:
            self._open(*frames.shape[1:3])
        self._writer.write(frames[:room])
        if self.config.overlay:
            self._overlay.write(light_up(frames[:room], chunk.persistent))
        self.written += room

    def _open(self, height: int, width: int) -> None:
        from sparse_forcing.video import VideoWriter

        scale = self.config.scale or max(1, WATCHABLE_SIDE // min(height, width))
        self.size = (height, width, scale)
        shape: dict[str, Any] = {"fps": self.fps, "height": height, "width": width, "scale": scale}
        # The overlay is entered first, so that it is committed last: it never stands without its video.
        if self.config.overlay:
            path = self.job.video.parent / OVERLAY_FOLDER / self.job.video.name
            self._overlay = self._stack.enter_context(VideoWriter(path, **shape))
        self._writer = self._stack.enter_context(VideoWriter(self.job.video, **shape))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None and self.size is None:
            raise OutputError(f"cannot write {self.job.video}: the model produced no frames")
        self._stack.__exit__(kind, error, trace)
        self._wall = time.perf_counter() - self._began

    def summary(self) -> dict[str, Any]:
        """Sizes and timings for the sidecar; seconds unless the name says otherwise."""
        height, width, scale = self.size or (0, 0, 1)
        made, model, decode = self.written + self.trimmed, sum(self.seconds), sum(self.decode_seconds)
        return {
            "num_frames": self.written,
            "trimmed_frames": self.trimmed,
            "fps": self.fps,
            "height": height,
            "width": width,
            "scale": scale,
            "time_to_first_frame": self.first_frame,
            "seconds_per_chunk": self.seconds,
            "decode_seconds_per_chunk": self.decode_seconds,
            "wall_seconds": self._wall,
            "generated_fps_without_decoding": made / model if model else None,
            "generated_fps_with_decoding": made / (model + decode) if model + decode else None,
            "cache_bytes_peak": self.cache_bytes,
        }


def light_up(frames: np.ndarray, persistent: Any) -> np.ndarray:
    """Frames [F, H, W, 3] in [0, 1], dimmed except where `persistent` [F, H, W] in [0, 1] says (None: nowhere)."""
    import numpy as np

    if persistent is None:
        return frames * np.float32(0.4)
    weight = np.asarray(persistent, dtype=np.float32)[: len(frames), ..., None]
    amber = np.array([1.0, 0.75, 0.2], np.float32)
    return np.clip(frames * (0.4 + 0.6 * weight) + 0.25 * weight * amber, 0, 1)


def versions() -> dict[str, str]:
    """Versions of what shapes a result."""
    found = {"sparse-forcing": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "diffusers", "transformers", "av", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def _collected_warnings(progress: Progress) -> Iterator[list[str]]:
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


@contextmanager
def _explained_out_of_memory(config: GenerateConfig, memory: MemoryConfig) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not (isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text):
            raise
        size = f"{config.width or 'default'} x {config.height or 'default'}"
        raise SparseForcingError(
            f"out of memory at size {size} with --memory {memory.kind}; lower --height and --width, "
            "or use --memory window or sparse"
        ) from error
