"""Say what works on this machine, and why not the rest: versions, devices, backends, the embedded model, video."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from sparse_forcing import __version__
from sparse_forcing.cli.flags import Parser, add_config_flags, number, path, read_config, whole_number
from sparse_forcing.cli.generate import FLAGS
from sparse_forcing.errors import ConfigError
from sparse_forcing.sampling.generation.jobs import GenerateConfig

REQUIRED = ("torch", "diffusers", "transformers", "safetensors", "einops", "av", "imageio", "numpy", "yaml")
_VIDEO = (
    "model", "device", "preset", "num_frames", "seconds", "height", "width", "guidance_scale", "chunk_frames", "memory",
    "window_frames", "sink_frames", "persistent_blocks", "cache_dtype", "tile", "text_encoder_device",
    "dtype", "weights", "offload", "tiny_vae", "tiled_decoding",
)  # fmt: skip
PREFLIGHT = {"model": "say whether a video of this model fits: a folder, or the name of a published size, as wan-14b"}
OPTIONAL = ("triton", "cv2", "scipy", "matplotlib", "gradio", "peft", "tensorboard")


@dataclass(frozen=True)
class Finding:
    """One line of the report. `no`: not here, nothing is broken; `broken`: must work and does not."""

    subject: str
    state: Literal["ok", "no", "broken"]
    detail: str


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--kernels", metavar="ARCH", help="report on every kernel compiled for ARCH, as in sm_90 or gfx942"
    )
    parser.add_argument("--config", type=path, metavar="PATH", help="memory that training by this YAML file needs")
    parser.add_argument("--stage", metavar="STAGE", help="with --config: what the file trains (default: guessed)")
    parser.add_argument(
        "--processes",
        type=whole_number,
        metavar="N",
        help="with --config: how many share the work (default: the file's)",
    )
    parser.add_argument(
        "--vram",
        type=number,
        metavar="GIB",
        help="with --model: memory to fit into, of a GPU unless --device says cpu (default: what the device here has)",
    )
    add_config_flags(parser, GenerateConfig, {name: PREFLIGHT.get(name, FLAGS[name]) for name in _VIDEO})
    parser.add_argument("--json", action="store_true", help="print one JSON value instead of lines")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; returns 1 when something that must work is broken."""
    if arguments.processes is not None and (arguments.config is None or arguments.processes < 1):
        raise ConfigError("--processes: must be at least 1 and needs --config")
    if arguments.stage is not None and arguments.config is None:
        raise ConfigError("--stage: says what the file of --config trains; give --config, too")
    given = [name for name in (*_VIDEO, "vram") if getattr(arguments, name, None) is not None]
    if given and "model" not in given:
        raise ConfigError(f"--{given[0].replace('_', '-')} has no effect without --model")
    if arguments.vram is not None and arguments.vram <= 0:
        raise ConfigError(f"--vram must be above 0, got {arguments.vram:g}")
    if given:
        return _preflight(arguments)
    if arguments.config is not None:
        return _memory_report(arguments.config, arguments.stage, arguments.processes, as_json=arguments.json)
    if arguments.kernels:
        return _kernel_report(arguments.kernels, as_json=arguments.json)
    findings = [finding for check in CHECKS for finding in _safely(check)]
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        width = max(len(finding.subject) for finding in findings)
        for finding in findings:
            print(f"{finding.state:<7} {finding.subject:<{width}}  {finding.detail}")
    return int(any(finding.state == "broken" for finding in findings))


def _safely(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A doctor survives what it finds: an unexpected exception of one check is its finding."""
    try:
        yield from check()
    except Exception as error:
        yield Finding(check.__name__.strip("_").replace("_", " "), "broken", _first_line(error))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _versions() -> Iterator[Finding]:
    yield Finding("sparse-forcing", "ok", __version__)
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    for name in (*REQUIRED, *OPTIONAL):
        try:
            module = importlib.import_module(name)
            yield Finding(name, "ok", str(getattr(module, "__version__", "")))
        except ImportError as error:
            yield Finding(name, "broken" if name in REQUIRED else "no", _first_line(error))


def _devices() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cpu", "ok", f"{platform.machine()}, {cores} cores, torch uses {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            yield Finding(
                f"cuda:{index}", "ok", f"{properties.name}, {memory}, sm_{properties.major}{properties.minor}"
            )
    else:
        built = torch.version.cuda or torch.version.hip
        reason = (
            f"torch is built for {built}, but finds no GPU or driver" if built else "this torch is built for CPUs only"
        )
        yield Finding("cuda", "no", reason)


def _backends() -> Iterator[Finding]:
    from sparse_forcing.kernels.compile_report import backend_status

    for row in backend_status():
        state: Literal["ok", "no"] = "no" if row["status"] == "unavailable" else "ok"
        yield Finding(f"{row['operation']} {row['backend']}", state, row["reason"] or row["status"])


def _embedded_models() -> Iterator[Finding]:
    from sparse_forcing.model_folder.folder import EMBEDDED_MODELS, PIPELINE_FILE
    from sparse_forcing.weights.manifest import folder_hash, verify_manifest

    folders = sorted(path.parent for path in EMBEDDED_MODELS.glob(f"*/{PIPELINE_FILE}"))
    if not folders:
        yield Finding("models", "broken", f"{EMBEDDED_MODELS}: no embedded model; reinstall the package")
    for folder in folders:
        subject = f"model {folder.name}"
        if verify_manifest(folder) is None:
            yield Finding(subject, "broken", f"{folder}: has no manifest of hashes")
        else:
            yield Finding(subject, "ok", f"all hashes match, weights_sha256 {folder_hash(folder)[:16]}")


def _video() -> Iterator[Finding]:
    import av
    import numpy as np

    from sparse_forcing.media.video import read_video, write_video

    frames = np.full((8, 32, 32, 3), (200, 40, 30), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        write_video(Path(folder) / "probe.mp4", frames, 16)
        decoded = read_video(Path(folder) / "probe.mp4")[0]
    error = int(np.abs(decoded.astype(int) - frames).max())
    state: Literal["ok", "broken"] = "ok" if error <= 8 else "broken"
    yield Finding("video", state, f"H.264 through libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}")


def _kernel_report(architecture: str, *, as_json: bool) -> int:
    """Print what the compiler makes of every kernel for an architecture, beside the recorded figures."""
    try:
        from sparse_forcing.kernels.compile_report import as_table, static_report

        rows = static_report(architecture)
    except ImportError as error:
        raise ConfigError(f"--kernels needs triton ({_first_line(error)})") from error
    print(json.dumps(rows) if as_json else as_table(rows))
    return 0


def _memory_report(config_path: Path, stage: str | None, processes: int | None, *, as_json: bool) -> int:
    """Print what one process of a training needs, part by part."""
    from sparse_forcing.training.entry import guess_stage, load_stage
    from sparse_forcing.training.memory_estimate.stages import estimate_stage

    stage = stage or guess_stage(config_path)
    config, _ = load_stage(stage, config_path)
    if processes is None:
        processes = getattr(getattr(config, "loop", None), "processes", None) or 1
    estimate, notes = estimate_stage(config, processes)
    if as_json:
        answer = {"stage": stage, "processes": processes, "bytes": asdict(estimate), "total": estimate.total}
        print(json.dumps({**answer, "notes": notes}))
        return 0
    print(f"{config_path}: stage {stage}, memory of one process of {processes}")
    print("\n".join([*estimate.lines(), *(f"note: {note}" for note in notes)]))
    return 0


def _preflight(arguments: argparse.Namespace) -> int:
    """Print what a video needs on a device, part by part; returns 1 when it does not fit. With --vram alone the device
    is a GPU that need not be here."""
    from sparse_forcing.devices import resolve_device
    from sparse_forcing.kernels.compile_report import backend_status
    from sparse_forcing.sampling.generation.placement import check_placement
    from sparse_forcing.sampling.generation.preflight import GIB, answer, memory_limit, outline

    config = read_config(GenerateConfig, arguments)
    elsewhere = arguments.vram is not None and config.device == "auto"
    device = "cuda" if elsewhere else resolve_device(config.device)
    model = outline(config)
    check_placement(config, model.defaults, device)
    limit = memory_limit(device) if arguments.vram is None else round(arguments.vram * GIB)
    found = answer(config, model, device, limit)
    need, fits = found.need, found.fits
    kind = config.memory or model.default_memory.kind
    sparse = kind == "sparse" and not model.geometry.whole_video
    kernels = [row["backend"] for row in backend_status() if row["status"] != "unavailable"] if sparse else ["dense"]
    if arguments.json:
        said = {"bytes": need.parts, "total": need.total, "limit": limit, "fits": fits, "fits_with": found.flags}
        print(json.dumps({**said, "device": device, "kernels": sorted(set(kernels)), "notes": model.sizes.notes}))
        return int(fits is False)
    for name, size in need.parts.items():
        print(f"{name.replace('_', ' '):<13} {size / GIB:8.2f} GiB")
    wasted = f", a tenth for the allocator included ({need.headroom:g} times)" if need.headroom > 1 else ""
    print(f"{'in all':<13} {need.total / GIB:8.2f} GiB at most on {device}{wasted}")
    print(f"attention by  {', '.join(sorted(set(kernels)))}")
    for note in model.sizes.notes:
        print(f"note: {note}")
    if limit is not None:
        print(f"{'fits' if fits else 'does not fit'} into {limit / GIB:.1f} GiB")
    if fits is False:
        print(f"fits with {' '.join(found.flags)}" if found.flags else "no setting that is known makes it fit")
    return int(fits is False)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (_versions, _devices, _backends, _embedded_models, _video)
