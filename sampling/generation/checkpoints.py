"""Checkpoints of a video that is being made: all that a later run goes on from, bit for bit, if this one is killed.

`resume/NAME` beside the video holds its coded segments (sparse_forcing/media/coded.py), a file of the state after a
chunk (memory, noise, decoder, text, the frames after the last segment), and `manifest.json`, which names that file with
its hash and says of which video it is. Every file is written whole or not at all, the manifest last; then older states
go. When the video is complete, the folder goes.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_forcing.config import to_plain
from sparse_forcing.errors import ConfigError, OutputError, SparseForcingError
from sparse_forcing.files import atomic_path, atomic_write_json, read_json, sha256_file, sweep_temporaries
from sparse_forcing.sampling.generation.jobs import GenerateConfig, Job
from sparse_forcing.sampling.generation.paths import checkpoint_folder

if TYPE_CHECKING:
    from sparse_forcing.sampling.generation.settings import Settings
    from sparse_forcing.sampling.pipeline import SparseForcingPipeline

_MANIFEST = "manifest.json"
_FILES = ("state-*.pt", "video-*.npz", "overlay-*.npz")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a video goes on.

    stream: for `pipe.stream` (`resumed`); clip: numbers of `Clip`; tails: uint8 [f, H, W, 3] frames after the last
    finished segment, by the name of the file that they belong to.
    """

    stream: dict[str, Any]
    clip: dict[str, Any]
    tails: dict[str, Any]


def remove_checkpoint(job: Job) -> None:
    """Remove the checkpoint of a video that is complete, or that is to be made from its beginning."""
    folder = checkpoint_folder(job)
    if not folder.is_dir():
        return
    with suppress(OSError):
        for pattern in (_MANIFEST, *_FILES):  # the manifest first: what is left must not look complete
            for path in folder.glob(pattern):
                path.unlink()
        sweep_temporaries(folder)
        folder.rmdir()
        folder.parent.rmdir()


class VideoCheckpoints:
    """The checkpoints of one video.

    Args:
        every: chunks between two of them.
        run: what the video is made from and with; another run goes on only if all of it is the same.
    """

    def __init__(self, job: Job, every: int, run: Mapping[str, Any]) -> None:
        self.folder, self.every, self.run = checkpoint_folder(job), every, to_plain(run)

    def load(self) -> Checkpoint | None:
        """The checkpoint that a killed run left, None where there is none.

        Raises:
            ConfigError: it is of another video; OutputError: it is damaged.
        """
        from sparse_forcing.weights.safe_load import load_pt

        path = self.folder / _MANIFEST
        if not path.exists():
            return None
        sweep_temporaries(self.folder)
        try:
            manifest = read_json(path)
            run, state = manifest["run"], self.folder / manifest["state"]
            if differences := ", ".join(_differences(run, self.run)):
                raise _another(self.folder, differences)
            if sha256_file(state) != manifest["sha256"]:
                raise OutputError(f"{state}: SHA-256 differs from the manifest; {_DAMAGED}")
            saved = load_pt(state)
            return Checkpoint(
                stream=saved["stream"],
                clip=manifest["clip"],
                tails={name: tail.numpy() for name, tail in saved["tails"].items()},
            )
        except (KeyError, TypeError, AttributeError, OSError) as error:
            raise OutputError(f"{self.folder}: not a complete checkpoint ({error!r:.100}); {_DAMAGED}") from error

    def save(self, chunk: Any, clip: Mapping[str, Any], tails: Mapping[str, Any]) -> None:
        """Commit the state after a chunk (`VideoChunk`); older states go. Raises OutputError."""
        import torch

        path = self.folder / f"state-{chunk.index + 1:08d}.pt"
        state = {"stream": chunk.state(), "tails": {name: torch.from_numpy(tail) for name, tail in tails.items()}}
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save(state, file)  # a file: what the disk says comes through
        manifest = {"run": self.run, "clip": dict(clip), "state": path.name, "sha256": sha256_file(path)}
        atomic_write_json(self.folder / _MANIFEST, manifest)
        for old in self.folder.glob("state-*.pt"):
            if old != path:
                old.unlink()

    def is_due(self, chunk: Any) -> bool:
        return (chunk.index + 1) % self.every == 0


def find_checkpoint(
    config: GenerateConfig,
    settings: Settings,
    job: Job,
    pipe: SparseForcingPipeline,
    described: Mapping[str, Any],
    note: Callable[[str], None],
) -> tuple[VideoCheckpoints | None, Checkpoint | None]:
    """Where the checkpoints of a video go, if any are made, and the one to go on from, if there is one. Without
    --resume the video begins anew, and what is there goes.

    Args:
        described: what the sidecar says of the run. note: told where the video goes on.

    Raises:
        ConfigError: the checkpoint is of another video; OutputError: it is damaged.
    """
    if config.checkpoints is None:
        return None, None
    checkpoints = VideoCheckpoints(job, config.checkpoints, _identity(config, settings, pipe, described))
    begun = checkpoints.load() if config.resume else None
    if begun is None:
        remove_checkpoint(job)
    else:
        note(f"{job.video}: goes on from frame {begun.clip['written']} of {settings.num_frames}")
    return checkpoints, begun


def _identity(
    config: GenerateConfig, settings: Settings, pipe: SparseForcingPipeline, described: Mapping[str, Any]
) -> dict[str, Any]:
    """All that the frames depend on. Files count by content, weights by their hash, texts by what they were read as,
    wherever that was."""
    names = ("prompt", "prompt_changes", "seed", "weights_sha256", "versions")
    own = {name: described[name] for name in names}
    files = ("image", "video", "tiny_vae")
    sizes = ("num_frames", "height", "width", "scale")
    asked = described["settings"]
    changes = [change["prompt"] for change in described["prompt_changes"]]
    return {
        **own,
        **{name: value for name, value in asked.items() if name not in (*files, "text_encoder_device")},
        **{name: getattr(settings, name) for name in sizes},
        **{name: _content(getattr(config, name)) for name in files},
        "texts": _read_as(pipe, [described["prompt"], asked["negative_prompt"], *changes]),
        "overlay": config.overlay,
        "compile": config.compile,
        "fps": config.fps,
    }


def _read_as(pipe: SparseForcingPipeline, texts: list[str]) -> str:
    """SHA-256 of what texts are read as."""
    with warnings.catch_warnings():  # said when the video is made
        warnings.simplefilter("ignore", UserWarning)
        read = pipe.encode_prompt(texts)
    return hashlib.sha256(read.float().cpu().numpy().tobytes()).hexdigest()


def _content(path: Path | None) -> str | None:
    return None if path is None else sha256_file(path)


_DAMAGED = "delete the folder to start over"


def _another(folder: Path, differences: str) -> SparseForcingError:
    return ConfigError(
        f"{folder}: the checkpoint is of another video ({differences:.300}); give the same settings again, or leave "
        "out --resume to start over"
    )


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name}: {old!r:.60} -> {new!r:.60}"
