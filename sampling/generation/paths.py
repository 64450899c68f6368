"""How the files of a video are called and where they lie, and whether those of two get in each other's way"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_forcing.errors import ConfigError, OutputError
from sparse_forcing.files import MAX_NAME_BYTES

if TYPE_CHECKING:
    from sparse_forcing.sampling.generation.jobs import Job

# Folders apart, so that a folder of results holds nothing but results.
OVERLAY_FOLDER, LIVE_FOLDER, RESUME_FOLDER = RESERVED = ("overlay", "live", "resume")


def slug(text: str, *, max_bytes: int = 80) -> str:
    """Lower-case letters and digits of `text` joined by hyphens, at most `max_bytes` of UTF-8; may be empty."""
    normal = unicodedata.normalize("NFKC", text[: 4 * max_bytes]).lower()
    # NFC last: lower() can leave combining sequences that another file system would compose differently.
    normal = unicodedata.normalize("NFC", normal)
    words = "".join(c if c.isalnum() else " " for c in normal).split()
    return "-".join(words).encode("utf-8", "ignore")[:max_bytes].decode("utf-8", "ignore").strip("-")


def safe_name(prompt: str, index: int, *, extra: str = "", suffix: str = ".mp4") -> str:
    """A file name for a prompt: `0003-a-red-ball.mp4`.

    The index comes first, so names of one run are unique and sorted, never reserved, hidden or empty, whatever the
    prompt holds; `extra` (a seed, a sample number) is appended. At most 255 bytes, no separators.
    """
    parts = [f"{index:04d}", slug(prompt), slug(extra, max_bytes=40)]
    name = "-".join(part for part in parts if part) + suffix
    if index < 0 or "/" in suffix or len(name.encode("utf-8")) > MAX_NAME_BYTES:
        raise OutputError(f"cannot make a file name from index {index}, suffix {suffix!r}")
    return name


def overlay_path(job: Job) -> Path:
    return job.video.parent / OVERLAY_FOLDER / job.video.name


def live_path(job: Job) -> Path:
    return job.video.parent / LIVE_FOLDER / job.video.name


def checkpoint_folder(job: Job) -> Path:
    """Where the checkpoint of a video lies."""
    return job.video.parent / RESUME_FOLDER / job.video.stem


def video_files(job: Job) -> tuple[Path, ...]:
    """All that is written, replaced or removed for a video, with whatever flags: files, and the checkpoint's folder."""
    return job.video, job.sidecar, overlay_path(job), live_path(job), checkpoint_folder(job)


def check_distinct(jobs: Sequence[Job]) -> None:
    """Refuse videos of which one would be lost: two that share a file, under whichever names (`a.mp4` and `a.MP4` have
    one sidecar, a link leads into another's folder), or one that lies below a file of another.

    Raises:
        ConfigError: names the two videos.
    """
    folders = _Folders()
    owners: dict[str, Job] = {}
    for job in jobs:
        own = [folders.resolve(path) for path in video_files(job)]
        if len(set(own)) < len(own):
            raise ConfigError(f"{job.video}: links make the video and the files beside it one; choose another output")
        for file in own:
            if (other := owners.setdefault(file, job)) is not job:
                raise ConfigError(_explain(job, other, file, own[0]))
    for folder in folders.found():
        if folder in owners:
            below = next(job for file, job in owners.items() if file.startswith(folder + os.sep))
            raise ConfigError(
                f"{below.video} lies below {folder}, which is a file of {owners[folder].video}; rename one of them"
            )


def _explain(job: Job, other: Job, file: str, video: str) -> str:
    if job.video == other.video:
        return f"{job.video}: two prompts name this output; give each its own"
    shared = "lead to one file" if file == video else f"would share {file}"
    return f"{other.video} and {job.video} {shared}; give each prompt an output of its own"


class _Folders:
    """The real names of files, found by looking at each folder once: there may be a hundred thousand videos."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[str, frozenset[str]]] = {}

    def resolve(self, path: Path) -> str:
        """The real name of a file that may be a link, or in a folder that is one."""
        folder = path.parent
        if folder not in self._seen:
            real = os.path.realpath(folder)
            self._seen[folder] = real, frozenset(_links(real))
        real, links = self._seen[folder]
        name = os.path.join(real, path.name)
        return os.path.realpath(name) if path.name in links else name

    def found(self) -> Iterable[str]:
        """Every folder of a file and all that it lies in."""
        real = {folder for folder, _ in self._seen.values()}
        return real.union(*({str(parent) for parent in Path(folder).parents} for folder in real))


def _links(folder: str) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in entries if entry.is_symlink())
    except OSError:  # it is still to be made
        return
