"""Work in forked processes: imports are paid for once, and a kill at random comes in the work, not before it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOADED = ("tests.training.workers", "sparse_forcing.cli.generate", "sparse_forcing.eval.evaluate")


class Forked:
    """`work(*arguments)`, which gives an exit code, in one process or in several that are one launch (`torchrun`).

    Its output goes to `log`. The process has a session of its own.
    """

    def __init__(
        self, log: Path, work: Callable[..., int], *arguments: Any, processes: int = 1, folder: Path = Path()
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        self.log = log
        log.write_text("")
        self.process = context.Process(target=_run, args=(log, folder.resolve(), processes, work, arguments))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.exitcode is None

    def finish(self, timeout: float = 400) -> tuple[int | None, str]:
        """(exit code, None while it runs; output)."""
        self.process.join(timeout)
        return self.process.exitcode, self.log.read_text()


def json_of(output: str) -> Any:
    """What a command with --json said, among its remarks."""
    (line,) = (line for line in output.splitlines() if line.startswith(("{", "[{")))
    return json.loads(line)


def _run(log: Path, folder: Path, processes: int, work: Callable[..., int], arguments: tuple[Any, ...]) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setsid()
    os.chdir(folder)
    if processes == 1:
        _end_with(work, arguments)
    os._exit(_launch(processes, work, arguments))


def _launch(processes: int, work: Callable[..., int], arguments: tuple[Any, ...]) -> int:
    """What torchrun does: 1 if a process failed, and that ends the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    alive = set()
    for rank in range(processes):
        if not (child := os.fork()):
            os.environ.update(
                {name: str(value) for name, value in (launch | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            )
            _end_with(work, arguments)
        alive.add(child)
    failed = False
    while alive:
        child, status = os.wait()
        alive.discard(child)
        if status and not failed:
            failed = True
            signal.signal(signal.SIGALRM, lambda *_: [os.kill(other, signal.SIGTERM) for other in alive])
            signal.alarm(10)  # as a rule the others end by themselves, and say why
    return int(failed)


def _end_with(work: Callable[..., int], arguments: tuple[Any, ...]) -> None:
    """Ends this process as the work ends."""
    code = 1
    try:
        code = work(*arguments)
    except BaseException:  # also SystemExit: nothing of the server that was forked may run on
        sys.excepthook(*sys.exc_info())  # torch's names the rank
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
