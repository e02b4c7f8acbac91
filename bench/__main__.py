"""The command line: `python -m bench --help`."""

from __future__ import annotations

import contextlib
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bench import BenchError, engine, streams
from labs.harness.reports import instruments
from labs.harness.reports.terminal import PlainConsole, show
from labs.harness.runner.machine_load import OtherLoad
from loadtests import generator
from serving.engines.base import EngineError
from serving.hardware import machine as machines
from serving.models.catalog import ModelError

PARTS = {"streams": streams.measure, "engine": engine.measure}
console = PlainConsole()
HELP = """Measure the lab's own instruments (docs/instruments.md has the aims).

[bold]streams[/] (4 min): what our Locust adds to TTFT and to chunk gaps,
and the CPU it costs, against a server that records what it really sent.

[bold]engine[/] (3 min): vLLM's throughput under our Locust and under
`vllm bench serve`: the same requests, in turns on one engine.

The figures are this machine's, now: close what else runs on it. What a
part finds is kept in results/ as soon as it is there. The exit code is 0
unless something broke, whatever the figures.
"""


def main(
    part: Annotated[
        list[str],
        typer.Option(
            envvar="LABS_PART", help=f"Only this part, again for another: {', '.join(PARTS)}."
        ),
    ] = list(PARTS),  # noqa: B006
    keep: Annotated[
        Path | None, typer.Option(help="Keep records, truth and logs in this new folder.")
    ] = None,
) -> None:
    """Measure the chosen parts; the command's help text is `HELP`."""
    if unknown := set(part) - set(PARTS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    engine_cores, client_cores = machines.split_cores()
    console.print(
        f"{machines.detect().describe()}; server on CPU {', '.join(map(str, engine_cores))},"
        f" clients on CPU {', '.join(map(str, client_cores))}"
    )
    if (load := os.getloadavg()[0]) > 0.5:
        console.print(
            f"[yellow]Other work is running (load average {load:.1f}): it is in these figures.[/]"
        )
    with contextlib.ExitStack() as exits:
        if keep:
            keep.mkdir(parents=True)
        work = keep or Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="lab-bench-")))
        failed = [name for name in PARTS if name in part and not measured(name, work / name)]
    if failed:
        raise typer.Exit(1)


def measured(name: str, work: Path) -> bool:
    """Measure a part and keep its figures; return whether that worked."""
    other_load = OtherLoad()
    try:
        figures = PARTS[name](work)
    except (BenchError, EngineError, generator.GeneratorError, ModelError) as error:
        console.print(f"[red]{name}: {escape(str(error))}[/]")  # the other parts go on
        return False
    dated = figures.model_copy(
        update={
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "cpu_others": sum(other_load.shares()[:2]),
        }
    )
    path = instruments.keep(machines.detect(), name, dated)
    found = instruments.Bench.model_validate({"machine": machines.detect(), name: dated})
    show(console, instruments.told([found]))
    console.print(f"[dim]{name}: kept in {os.path.relpath(path)}[/]")
    return True


if __name__ == "__main__":
    app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)
    app.command(help=HELP)(main)
    app()
