"""The command line: one module for each command, imported only when that command runs, so that `--help` is fast.

A command module has `add_arguments(parser)` and `run(arguments) -> exit code`. Exit codes: 0 done, 1 done but something
failed (see the command), 2 bad input (one line on stderr), 130 interrupted, 129 hung up, 143 terminated.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from sparse_forcing import __version__
from sparse_forcing.cli.flags import Parser
from sparse_forcing.devices import is_out_of_memory
from sparse_forcing.errors import OutputError, SparseForcingError
from sparse_forcing.files import NO_ROOM, find_system_error
from sparse_forcing.machine_memory import return_what_is_freed
from sparse_forcing.threads import own_process

PROGRAM = "sparse-forcing"
COMMANDS = {
    "generate": "videos from prompts",
    "train": "train or distil a model",
    "evaluate": "judge a folder of videos",
    "bench": "measure attention on this machine, after checking it",
    "convert": "turn Wan or Self-Forcing weights into a diffusers folder",
    "data": "make data to train on",
    "playground": "a page in the browser: watch a video while it is made",
    "doctor": "say what works on this machine, and why not the rest",
}

_FOR_LESS_MEMORY = "choose smaller pictures, fewer frames, or less at a time"
MACHINE_TO_THEMSELVES = (
    "bench",
    "train",
    "reproduce",
)  # they measure or fill it: threads may spin, what is freed may stay


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Prints one line, no traceback, for input that cannot be used."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] not in COMMANDS:
        return _run_guarded(PROGRAM, lambda: _top_level(arguments))
    return run_module(f"sparse_forcing.cli.{arguments[0]}", arguments[1:], name=f"{PROGRAM} {arguments[0]}")


def run_module(module: str, arguments: Sequence[str], *, name: str | None = None) -> int:
    """Run a command's module; `name` is what its messages call it (default: `python -m` and the module)."""
    if module.rpartition(".")[2] not in MACHINE_TO_THEMSELVES and own_process():
        return_what_is_freed()
    name = name or f"python -m {module}"
    return _run_guarded(name, lambda: _command(name, module, list(arguments)))


def say(text: str) -> None:
    """Print a line of results at once."""
    print(text, flush=True)


def note(text: str) -> None:
    """Print a line about the work on standard error."""
    print(text, file=sys.stderr, flush=True)


class _Messages:
    """Standard error while a command runs: a reader that is gone, or a log on a full disk, does not end the work."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[..., Any], *text: str) -> None:
        try:
            call(*text)
        except OSError as error:
            _discard(self._stream)
            self._explain(error)

    def _explain(self, error: OSError) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Results(_Messages):
    """Standard output while a command runs: a reader that is gone (`| head`) does not end the work, which writes files,
    too; results that a full disk does not take are an OutputError, whoever prints them."""

    def _explain(self, error: OSError) -> None:
        if not isinstance(error, BrokenPipeError):
            raise OutputError(f"cannot write to standard output: {error.strerror or error}") from error


def _run_guarded(name: str, work: Callable[[], int]) -> int:
    previous = {number: signal.signal(number, _raise_terminated) for number in _list_stopping_signals()}
    format_before, warnings.formatwarning = warnings.formatwarning, _one_line
    _open_streams()
    _printable(sys.stdout)
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Results(sys.stdout), _Messages(sys.stderr)  # type: ignore[assignment]
    try:
        try:
            return work()
        finally:
            sys.stdout.flush()  # here, where a full disk can still be named
    except SparseForcingError as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.filename is None and error.errno not in NO_ROOM:
            raise
        # The disk is full, or a folder was removed or made read-only while a library wrote there: nothing to trace.
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        print(f"{name}: error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except Exception as error:
        if is_out_of_memory(error):
            print(f"{name}: error: out of memory; {_FOR_LESS_MEMORY}", file=sys.stderr)
            return 2
        said = find_system_error(error)
        if said is None or said.errno not in NO_ROOM:
            raise
        print(f"{name}: error: {said.strerror}", file=sys.stderr)
        return 2
    finally:
        (sys.stdout, sys.stderr), warnings.formatwarning = streams, format_before
        for number, handler in previous.items():
            signal.signal(number, handler)


def _command(name: str, module: str, arguments: list[str]) -> int:
    command = importlib.import_module(module)
    parser = Parser(prog=name, description=command.__doc__)
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


def _top_level(arguments: list[str]) -> int:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    parser = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND ...",
        description="Autoregressive video generation with persistent block-sparse attention.",
        epilog=f"commands:\n{listing}\n\n{PROGRAM} COMMAND --help describes one of them.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, nargs="?", help="see below")
    parser.parse_args(arguments)
    parser.print_help()
    return 2


def _list_stopping_signals() -> list[int]:
    """SIGTERM, and SIGHUP (the terminal is gone) unless it is ignored, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM] if ignored else [signal.SIGTERM, signal.SIGHUP]


def _raise_terminated(number: int, frame: Any) -> None:
    # An exception, so that half-written files are removed on the way out.
    sys.exit(128 + number)


def _open_streams() -> None:
    """A standard stream that was closed by the caller swallows what is written, as /dev/null does."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


def _one_line(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
    """How a warning is printed: what is meant for users without the place in the code that it comes from."""
    return f"warning: {message}\n" if category is UserWarning else f"{category.__name__}: {message}\n"


def _discard(stream: Any) -> None:
    # Without this, Python complains at exit that it cannot flush.
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _printable(stream: Any) -> None:
    # A path that the terminal's encoding cannot show must not lose the work that led to it.
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
