"""The terminal that all commands share: how they print, show progress, report errors and end."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dashboards.prometheus import PrometheusError
from dashboards.stack import StackError
from labs.harness.reports import terminal
from labs.harness.reports.markdown import Markdown
from labs.harness.reports.terminal import PlainConsole
from labs.harness.spec.lab import LabError
from loadtests.generator import GeneratorError
from serving.bundle import BundleError
from serving.engines.base import EngineError
from serving.hardware.gpus import GpuError
from serving.models.catalog import ModelError
from serving.processes.masking import tellable
from serving.processes.ports import PortTaken

console = PlainConsole(width=None if sys.stdout.isatty() else 100)
errors = PlainConsole(stderr=True, soft_wrap=True)
EXPECTED_ERRORS = (
    LabError,
    ModelError,
    EngineError,
    GpuError,
    PortTaken,
    GeneratorError,
    PrometheusError,
    BundleError,
    StackError,
)  # each has a sentence for the reader as its message


MENDS = {
    errno.ENOSPC: ": free some of the disk that holds RESULTS=, SCRATCH= or the temporary folder",
    errno.EDQUOT: ": free some of what this user may keep, or name other folders with RESULTS= and"
    " SCRATCH=",
    errno.ENOENT: ": name a file or folder that is there, or that can be made",
    errno.ENOTDIR: ": a file is in the way, so name another folder",
    errno.EFBIG: ": raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: ": name folders that can be written with RESULTS= and SCRATCH=",
}


class ConsoleProgress:
    """Shows a run's progress: on a terminal a line with the time remaining, else plain lines."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(30),
            TimeElapsedColumn(),
            TextColumn("[cyan]{task.fields[remaining]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("setting up", total=None, remaining="")
        self._began = time.monotonic()

    def __enter__(self) -> ConsoleProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _elapsed(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        return f"[dim]{minutes}:{seconds:02}[/]"

    def message(self, text: str) -> None:
        console.print(f"{self._elapsed()} {escape(tellable(text))}")

    def expect(self, remaining_s: float) -> None:
        done = time.monotonic() - self._began
        self._progress.update(self._task, total=done + remaining_s, completed=done)
        self.message(f"About {minutes(remaining_s)} to come")

    def waiting(self, text: str) -> None:
        raise_if_stopped()
        self._progress.update(
            self._task, description=escape(text), completed=time.monotonic() - self._began
        )

    def part_done(self, text: str, remaining_s: float) -> None:
        raise_if_stopped()
        done = time.monotonic() - self._began
        left = f"{minutes(remaining_s)} left" if remaining_s else "the last"
        self._progress.update(self._task, total=done + remaining_s, completed=done, remaining=left)
        console.print(f"{self._elapsed()} {escape(text)} [dim]({left})[/]")

    def show(self, content: str) -> None:
        show(Markdown(content))


def show_path(path: Path) -> None:
    """Print a path from the working directory, in one line."""
    console.print(shown_path(path), soft_wrap=True)


def shown_path(path: Path) -> str:
    """Write a path from the working directory so that nothing in it is taken for markup."""
    return escape(os.path.relpath(path))


def say(text: str) -> None:
    """Print a line in which nothing is taken for markup."""
    console.print(escape(text), soft_wrap=True)


def show(content: Markdown) -> None:
    """Print a part of a document."""
    terminal.show(console, content)


def minutes(seconds: float) -> str:
    """Write a duration in minutes, or in seconds where it is shorter than 90 s."""
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


_stop_signals: list[int] = []  # signals received that ask the program to end


def _stop(signum: int, frame: FrameType | None) -> None:
    _stop_signals.append(signum)
    raise_if_stopped()


def raise_if_stopped() -> None:
    """End the program where a signal asked for it.

    The handler raises too, but its exception is lost when it interrupts a finalizer.
    """
    if _stop_signals:
        raise (
            KeyboardInterrupt
            if _stop_signals[-1] == signal.SIGINT
            else SystemExit(128 + _stop_signals[-1])
        )


def _report_unraisable(lost: sys.UnraisableHookArgs) -> None:
    """Report an exception that a finalizer lost, unless a signal raised it: that is raised anew."""
    if not (_stop_signals and isinstance(lost.exc_value, KeyboardInterrupt | SystemExit)):
        sys.__unraisablehook__(lost)


def _bypass_proxy_on_loopback() -> None:
    """Keep requests to engines and Prometheus from going through the proxy in http_proxy."""
    no_proxy = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if "127.0.0.1" not in no_proxy.split(","):
        os.environ["no_proxy"] = ",".join(filter(None, (no_proxy, "127.0.0.1")))


def refusal_of(error: OSError) -> str:
    """Say what the operating system refused, of which file, and where known what mends it."""
    path = error.filename2 or error.filename  # of two, the one that was to be written
    name = f" ({path})" if path else ""
    return f"{error.strerror or error}{name}{MENDS.get(error.errno or 0, '')}"


@contextmanager
def reported_errors() -> Iterator[None]:
    """End expected failures in a sentence and an exit code; treat SIGTERM and SIGHUP as Ctrl-C.

    A signal that is ignored, as SIGHUP is under nohup, stays so.
    """
    _bypass_proxy_on_loopback()
    sys.unraisablehook = _report_unraisable
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _stop)
    try:
        yield
    except EXPECTED_ERRORS as error:
        errors.print(f"[bold red]error:[/] {escape(tellable(str(error)))}")
        raise typer.Exit(error.exit_code if isinstance(error, LabError) else 1) from None
    except OSError as error:
        errors.print(f"[bold red]error:[/] {escape(refusal_of(error))}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Stopped.")
        raise typer.Exit(130) from None
