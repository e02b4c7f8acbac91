"""Plays a run for a reader at a terminal."""

from __future__ import annotations

from rich.markup import escape

from labs.harness.cli.terminal import ConsoleProgress, console, shown_path
from labs.harness.plan.resolve import RunRequest
from labs.harness.reports import report
from labs.harness.runner.run import run as run_lab
from labs.harness.storage.results import RunFolder


def play(request: RunRequest, continuing: str = "RESUME=1") -> RunFolder:
    """Run a lab with its progress on the terminal, and print what it measured.

    `continuing` is what a reader who stops it is told to call to go on.
    """
    with ConsoleProgress() as progress:
        try:
            folder = run_lab(request, progress)
        except (KeyboardInterrupt, SystemExit, OSError):
            progress.message(
                f"Stopping: finished trials are kept, and {continuing} continues from there"
            )
            raise
    summary = folder.summary()
    progress.show(report.digest(report.Facts.of(folder)))
    if request.clock.bounded:
        console.print(f"\nRecorded in [bold]{shown_path(folder.path)}[/]: `make report` tells it")
    else:
        console.print(f"\nReport: [bold]{shown_path(folder.path / 'report.md')}[/]")
        console.print("[dim]Open report.html beside it in a browser to see every request.[/]")
    if summary.failed:
        console.print(
            f"Trials that failed: {len(summary.failed)}; the finished ones are kept. The first"
            f" failed with: {escape(next(iter(summary.failed.values())))}"
        )
    return folder
