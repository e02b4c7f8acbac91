"""What commands share at a terminal: how they print, show a run, fail and end."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dashboards.prometheus import PrometheusError
from dashboards.stack import StackError
from labs.filing.results import RunFolder, all_runs, open_run
from labs.lab import LabError
from labs.telling import terminal
from labs.telling.document import Block
from loadtests.generator import GeneratorError
from serving.bundle import BundleError
from serving.engines.base import EngineError
from serving.models import ModelError
from serving.ports import PortTaken

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
EXPECTED = (
    LabError,
    ModelError,
    EngineError,
    PortTaken,
    GeneratorError,
    PrometheusError,
    BundleError,
    StackError,
)  # each a sentence for the reader


class ConsoleProgress:
    """Shows a run: a live line with time remaining on a terminal, plain lines elsewhere."""

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
        console.print(f"{self._elapsed()} {escape(text)}")

    def expect(self, remaining_s: float) -> None:
        done = time.monotonic() - self._began
        self._progress.update(self._task, total=done + remaining_s, completed=done)
        self.message(f"About {minutes(remaining_s)} of load to come")

    def waiting(self, text: str) -> None:
        heed()
        self._progress.update(
            self._task, description=escape(text), completed=time.monotonic() - self._began
        )

    def trial_done(self, text: str, remaining_s: float) -> None:
        heed()
        done = time.monotonic() - self._began
        left = f"{minutes(remaining_s)} left" if remaining_s else "last trial"
        self._progress.update(self._task, total=done + remaining_s, completed=done, remaining=left)
        console.print(f"{self._elapsed()} {escape(text)} [dim]({left})[/]")

    def show(self, content: Block) -> None:
        show(content)


def show(content: Block) -> None:
    """Print a part of a document."""
    terminal.show(console, content)


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def folders_of(run: Path | None) -> list[RunFolder]:
    """The run named, or every run there is."""
    if run is None:
        return all_runs()
    return [open_run(run)]


_told: list[int] = []  # signals that asked us to end


def _stop(signum: int, frame: FrameType | None) -> None:
    _told.append(signum)
    heed()


def heed() -> None:
    """End if we were told to: what a handler raises is lost when it falls into a finalizer."""
    if _told:
        raise KeyboardInterrupt if _told[-1] == signal.SIGINT else SystemExit(128 + _told[-1])


def _ask_loopback_directly() -> None:
    """Engines and Prometheus are never asked through a proxy, whatever http_proxy says."""
    spared = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if "127.0.0.1" not in spared.split(","):
        os.environ["no_proxy"] = ",".join(filter(None, (spared, "127.0.0.1")))


@contextmanager
def plainly() -> Iterator[None]:
    """Expected failures end in one sentence and exit code 1; SIGTERM and SIGHUP as Ctrl-C does."""
    _ask_loopback_directly()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _stop)
    try:
        yield
    except EXPECTED as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}")
        raise typer.Exit(1) from None
    except OSError as error:
        name = f" ({error.filename})" if error.filename else ""
        errors.print(f"[bold red]error:[/] {escape(str(error.strerror or error))}{escape(name)}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Stopped.")
        raise typer.Exit(130) from None
