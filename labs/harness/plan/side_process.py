"""Programs that a run asks for figures before its engines start, each in a process of its own.

They end with the run, whatever ends it, and their log goes with them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from serving.processes.process import Process


@contextlib.contextmanager
def guarded(
    name: str, argv: Sequence[str], env: Mapping[str, str] | None = None
) -> Iterator[Process]:
    """Start a process that ends with this one, with pipes to it and a log that goes with it."""
    with (
        TemporaryDirectory(prefix="lab-side-") as folder,
        Process(name, argv, log=Path(folder) / "log", env=env, talk=True) as process,
    ):
        yield process


def last_line(process: Process) -> str:
    """Return the last line of its log that may say why it failed."""
    lines = (line.strip() for line in reversed(process.tail().splitlines()))
    reasons = (line for line in lines if line and not line.startswith("For further information"))
    return next(reasons, "it printed no reason")


def ask(
    name: str, argv: Sequence[str], questions: Iterable[str], limit_s: float
) -> tuple[list[str], str]:
    """Send a program its questions, a line each, and wait for its end, or end it after `limit_s`.

    Returns the lines that it printed, and why it failed; an empty reason where it did not.
    """
    with guarded(name, argv) as process:
        time_limit = threading.Timer(limit_s, process.request_stop)
        time_limit.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended: its exit code says so
                process.stdin.writelines(f"{question}\n" for question in questions)
                process.stdin.close()
            lines = process.stdout.read().splitlines()
            failed = process.wait()
        finally:
            time_limit.cancel()
        return lines, last_line(process) if failed else ""
