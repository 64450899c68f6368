"""Files: written whole or not at all.

Every file of this project is written to a temporary sibling, flushed to the disk, and renamed over its final name, so
that a crash, a full disk or a kill leaves either the old file or the new one. Temporaries are called
`.sf-tmp-<pid>-<machine>-<random><suffix>`: readers ignore them, `sweep_temporaries` removes those whose process is
gone.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from sparse_forcing.errors import ConfigError, InUseError, OutputError, SparseForcingError
from sparse_forcing.strict_json import parse_json

PathLike = str | os.PathLike[str]

TEMPORARY_PREFIX = ".sf-tmp-"
LOCK_NAME = ".sparse-forcing.lock"
MAX_NAME_BYTES = 255
_MACHINE = hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]
NO_ROOM = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS})
"""What the system says of a disk that takes no more."""
_REFUSED = NO_ROOM | {errno.EACCES, errno.EPERM}


def is_file(path: PathLike, error: type[SparseForcingError]) -> bool:
    """Whether `path` is a regular file. Raises `error` for a name or folder that cannot even be looked up."""
    return stat.S_ISREG(_mode(path, error))


def is_folder(path: PathLike, error: type[SparseForcingError]) -> bool:
    """Whether `path` is a folder. Raises as `is_file`."""
    return stat.S_ISDIR(_mode(path, error))


def _mode(path: PathLike, error: type[SparseForcingError]) -> int:
    """The mode bits of what `path` leads to; 0 where there is nothing."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except (OSError, ValueError) as problem:
        raise error(f"cannot look at {os.fspath(path)!r}: {getattr(problem, 'strerror', None) or problem}") from problem


def find_system_error(error: BaseException | None) -> OSError | None:
    """What the system said, of an error that is it, quotes it, as safetensors' do, or came of it, as torch's do."""
    while error is not None and not isinstance(error, OSError):
        if quoted := re.search(r"\(os error (\d+)\)", str(error)):
            return OSError(int(quoted[1]), os.strerror(int(quoted[1])))
        raised_by_torch = isinstance(error, RuntimeError) and not error.__suppress_context__
        error = error.__context__ if raised_by_torch else error.__cause__
    return error


@contextmanager
def explain_full_disk(target: Path, size: int | None = None) -> Iterator[None]:
    """While some library writes `target`: what a disk says that is full or may not be written, or a folder that is
    gone, is an OutputError about it; the rest passes through, and what was said of a file elsewhere."""
    try:
        yield
    except SparseForcingError:
        raise
    except Exception as error:
        said = find_system_error(error)
        here = said is not None and (said.filename is None or Path(said.filename).is_relative_to(target.parent))
        if said is not None and here and (said.errno in _REFUSED or not target.parent.is_dir()):
            raise _cannot_write(target, said, size) from error
        raise


def find_temporary(path: PathLike) -> str | None:
    """The part of a path that is named as the temporaries of this module, which the next run would sweep away."""
    return next((part for part in Path(path).parts if part.startswith((TEMPORARY_PREFIX, LOCK_NAME))), None)


def _temporary(folder: Path, suffix: str = "") -> Path:
    return folder / f"{TEMPORARY_PREFIX}{os.getpid()}-{_MACHINE}-{secrets.token_hex(4)}{suffix}"


def _cannot_write(path: Path, error: OSError, size: int | None = None) -> OutputError:
    needed = f" ({size} bytes)" if size is not None else ""
    return OutputError(f"cannot write {path}{needed}: {error.strerror or error}")


def _resolve_target(path: PathLike) -> Path:
    """The real file that a write to `path` replaces; refuses folders, devices and names no file system takes."""
    shown = os.fsdecode(os.fspath(path))
    if "\0" in shown:
        raise OutputError(f"cannot write {shown!r}: the name contains a NUL character")
    try:
        target = Path(os.path.realpath(shown))
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return target
    except (OSError, UnicodeEncodeError) as error:
        raise OutputError(f"cannot write {shown!r}: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(mode):
        raise OutputError(f"cannot write {shown}: it is a folder; name a file inside it")
    if not stat.S_ISREG(mode):
        raise OutputError(f"cannot write {shown}: it is not a regular file")
    return target


def _fsync_folder(folder: Path) -> None:
    # A rename is durable only once the folder is; file systems that cannot sync a folder say EINVAL.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _commit(temporary: Path, target: Path, mode: int) -> None:
    handle = os.open(temporary, os.O_RDONLY)
    try:
        os.fchmod(handle, mode)
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(temporary, target)
    _fsync_folder(target.parent)


@contextmanager
def atomic_path(path: PathLike, *, size: int | None = None) -> Iterator[Path]:
    """Yield an empty temporary file next to `path`; rename it over `path` if the block succeeds, else remove it.

    For writers that want a name (encoders, safetensors). The temporary keeps the suffix of `path`; parent folders are
    created; the final mode follows the umask even where the writer made a private file.

    Args:
        path: the final name; a link is followed, folders and devices are refused.
        size: bytes about to be written, only to name them in the message when they do not fit.

    Raises:
        OutputError: the folder or file cannot be written, or the disk is full.
    """
    target = _resolve_target(path)
    temporary = _temporary(target.parent, target.suffix[:16])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except OSError as error:
        raise _cannot_write(target, error, size) from error
    try:
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
        os.close(handle)
        with explain_full_disk(target, size):
            yield temporary
        try:
            _commit(temporary, target, mode)
        except OSError as error:
            raise _cannot_write(target, error, size) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def atomic_write_bytes(path: PathLike, data: bytes) -> None:
    """Write `data` to `path` whole or not at all. Raises OutputError naming the path and the bytes needed."""
    with atomic_path(path, size=len(data)) as temporary, open(temporary, "wb") as file:
        file.write(data)


def atomic_write_text(path: PathLike, text: str) -> None:
    """Write `text` as UTF-8 with the line ends it has. Raises OutputError."""
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise OutputError(
            f"cannot write {os.fspath(path)!r}: the text is not valid Unicode ({error.reason})"
        ) from error
    atomic_write_bytes(path, data)


def atomic_write_json(path: PathLike, value: Any) -> None:
    """Write `value` as indented JSON. NaN and infinity are not JSON: they raise OutputError (write None instead)."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise OutputError(f"cannot write {os.fspath(path)!r} as JSON: {error}") from error
    atomic_write_text(path, text + "\n")


def open_input(path: PathLike) -> BinaryIO:
    """A file opened for reading. Raises OSError, for a pipe that nobody writes to, too: it would be waited for."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(handle, True)
    file = open(handle, "rb")
    if stat.S_ISFIFO(os.fstat(handle).st_mode) and not file.peek(1):
        file.close()
        raise OSError(errno.EPIPE, "a pipe that nobody writes to")
    return file


def read_json(path: PathLike, *, max_bytes: int = 64 << 20, expected: str = "JSON") -> Any:
    """Read a JSON file strictly (see `parse_json`). Raises ConfigError for a missing, huge or invalid file."""
    try:
        with open_input(path) as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {os.fspath(path)}: {error.strerror or error}") from error
    if len(data) > max_bytes:
        raise ConfigError(f"{os.fspath(path)}: larger than {max_bytes} bytes; expected {expected}")
    return parse_json(data, source=os.fspath(path), expected=expected)


def sha256_file(path: PathLike) -> str:
    """Hex SHA-256 of a file, read in pieces. Raises OSError when it cannot be read, or is a pipe or a device."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for, a device has no end
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def check_target(path: PathLike) -> Path:
    """The real file that a write to `path` replaces, looked at without writing; nor is its folder checked.

    Raises:
        OutputError: it is a folder or a device, or its name is too long or not UTF-8, which JSON files could not hold.
    """
    target = _resolve_target(path)
    try:
        size = max(len(name.encode("utf-8")) for name in (Path(path).name, target.name))
    except UnicodeEncodeError as error:
        raise OutputError(f"cannot write {os.fspath(path)!r}: the name is not valid UTF-8") from error
    if size > MAX_NAME_BYTES:
        raise OutputError(f"cannot write {path}: the name is longer than {MAX_NAME_BYTES} bytes")
    return target


def remove_file(path: PathLike) -> None:
    """Remove the file that a write to `path` would replace, if there is one. Raises OutputError."""
    target = _resolve_target(path)
    try:
        target.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot remove {target}: {error.strerror or error}") from error


def check_writable(path: PathLike, *, folder: bool = False) -> Path:
    """Prove, before any work begins, that `path` (a file, or with `folder` a folder) can be written; return it.

    Missing folders are created. A file is probed with a temporary beside it, a folder with a temporary inside it, into
    which something is written: a full disk still takes empty files.

    Raises:
        OutputError: the path is a folder where a file is meant, or the reverse, or cannot be written.
    """
    if not folder:
        check_writable(check_target(path).parent, folder=True)
        return Path(path)
    shown = os.fsdecode(os.fspath(path))
    if "\0" in shown:
        raise OutputError(f"cannot write {shown!r}: the name contains a NUL character")
    if taken := find_temporary(shown):
        raise OutputError(f"cannot write into {shown}: {taken:.40} is a name of temporary files; choose another")
    probe = _temporary(Path(shown))
    missing = [folder for folder in (Path(shown), *Path(shown).parents) if not os.path.lexists(folder)]
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        with open(probe, "xb") as file:
            file.write(b"probe")
            file.flush()
            os.fsync(file.fileno())  # some file systems notice only here
        probe.unlink()
    except OSError as error:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
        for created in missing:
            with suppress(OSError):
                created.rmdir()
        kind = isinstance(error, FileExistsError)
        reason = "it is a file, not a folder" if kind else error.strerror or error
        raise OutputError(f"cannot write into {shown}: {reason}") from error
    return Path(shown)


@contextmanager
def without_empty_folders(folders: Iterable[Path]) -> Iterator[None]:
    """Remove, at the end of the block, those of `folders` and their parents that came to be in it and are empty."""
    missing = {folder for inner in folders for folder in (inner, *inner.parents) if not os.path.lexists(folder)}
    try:
        yield
    finally:
        for folder in sorted(missing, key=lambda folder: len(folder.parts), reverse=True):
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def output_lock(path: PathLike, *, shared: bool = False) -> Iterator[None]:
    """Hold `path` (an existing folder, or a file to be written) for this run; a second run gets InUseError at once.

    A link is followed, so that a file is held under all of its names. What killed runs left in the folder is swept.
    The lock dies with its process, so a killed run never blocks the next one. Runs that hold it `shared` do so beside
    each other. Not for network file systems without working locks.

    Raises:
        OutputError: the lock cannot be written, on a full disk for example; none is left behind.
    """
    target = Path(os.path.realpath(path))
    name = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]
    lock = target / LOCK_NAME if is_folder(target, OutputError) else target.parent / f"{LOCK_NAME}-{name}"
    handle = _take_lock(lock, target, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    try:
        sweep_temporaries(lock.parent)
        yield
        sweep_temporaries(lock.parent)  # of a run that was still dying when this one began
    finally:
        # Unlinked while held: whoever opened the old file finds another inode under the name and starts over.
        if not shared:
            with suppress(OSError):
                lock.unlink()
        os.close(handle)


def _take_lock(lock: Path, target: Path, kind: int) -> int:
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _cannot_write(lock, error) from error
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(handle)
            raise InUseError(
                f"another run (process {owner}) is writing to {target}; wait for it or choose another output"
            ) from error
        try:
            if os.stat(lock).st_ino == os.fstat(handle).st_ino:
                os.truncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode(), 0)
                return handle
            os.close(handle)  # whoever held it removed it meanwhile
        except FileNotFoundError:
            os.close(handle)
        except OSError as error:
            with suppress(OSError):
                lock.unlink()
            os.close(handle)
            raise _cannot_write(lock, error) from error


def sweep_temporaries(folder: PathLike) -> list[Path]:
    """Remove temporaries in `folder` whose process no longer runs on this machine; return what was removed."""
    removed = []
    for leftover in sorted(Path(folder).glob(f"{TEMPORARY_PREFIX}*")):
        if not _is_abandoned(leftover):
            continue
        with suppress(OSError):
            shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
            removed.append(leftover)
    return removed


def holds_nothing(folder: PathLike) -> bool:
    """Whether a folder is empty but for what killed runs left: locks, and temporaries whose process is gone."""
    return all(path.name.startswith(LOCK_NAME) or _is_abandoned(path) for path in Path(folder).iterdir())


def _is_abandoned(path: Path) -> bool:
    owner, *rest = path.name.removeprefix(TEMPORARY_PREFIX).split("-")
    elsewhere = len(rest) > 1 and rest[0] != _MACHINE  # of several that write into one folder
    return path.name.startswith(TEMPORARY_PREFIX) and owner.isdigit() and not elsewhere and not _alive(int(owner))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    try:  # whoever nobody has waited for has ended, too
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in b"ZX"
    except OSError:
        return True
