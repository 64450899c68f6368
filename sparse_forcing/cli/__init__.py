"""The command line: one module for each command, imported only when that command runs, so that `--help` is fast.

A command module has `add_arguments(parser)` and `run(arguments) -> exit code`. Exit codes: 0 done, 1 done but something
failed (see the command), 2 bad input (one line on stderr), 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from sparse_forcing import __version__
from sparse_forcing.cli.flags import Parser
from sparse_forcing.errors import SparseForcingError

PROGRAM = "sparse-forcing"
COMMANDS = {
    "generate": "videos from prompts",
    "train": "train or distil a model",
    "evaluate": "judge a folder of videos",
    "bench": "measure attention on this machine, after checking it",
    "convert": "turn Wan or Self-Forcing weights into a diffusers folder",
    "data": "make data to train on",
    "doctor": "say what works on this machine, and why not the rest",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Prints one line, no traceback, for input that cannot be used."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] not in COMMANDS:
        return _guarded(PROGRAM, lambda: _top_level(arguments))
    return run_module(f"sparse_forcing.cli.{arguments[0]}", arguments[1:], name=f"{PROGRAM} {arguments[0]}")


def run_module(module: str, arguments: Sequence[str], *, name: str | None = None) -> int:
    """Run a command's module; `name` is what its messages call it (default: `python -m` and the module)."""
    name = name or f"python -m {module}"
    return _guarded(name, lambda: _command(name, module, list(arguments)))


def _guarded(name: str, work: Callable[[], int]) -> int:
    previous = signal.signal(signal.SIGTERM, _terminated)
    _printable(sys.stdout)
    try:
        try:
            return work()
        finally:
            sys.stdout.flush()  # here, where a reader that is gone can still be handled
    except SparseForcingError as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Without this, Python complains at exit that it cannot flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)


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


def _terminated(number: int, frame: Any) -> None:
    # An exception, so that half-written files are removed on the way out.
    sys.exit(128 + number)


def _printable(stream: Any) -> None:
    # A path that the terminal's encoding cannot show must not lose the work that led to it.
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
