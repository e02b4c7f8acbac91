"""The command line: `python -m bench --help`."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bench import BenchError, aa, engine, neighbour, overhead, recording, streams
from bench.clock import Clock
from bench.console import console
from bench.truth import PROGRAMS
from labs.running.machine_load import Others
from labs.telling import instruments
from loadtests import generator
from serving import machine as machines
from serving import models
from serving.engines.base import EngineError

MAIN = ("streams", "engine", "neighbour", "recording", "overhead")
PARTS = (*MAIN, "aa")
REPEATS, PROCESSES, PAIRS, RUNS = 2, (1, 2), 4, 20
TRIAL_S = 9.0  # a truth server's start, warm-up, window and drain


def main(
    part: Annotated[
        list[str],
        typer.Option(
            envvar="LABS_PART", help=f"Only this part, again for another: {', '.join(PARTS)}."
        ),
    ] = list(MAIN),  # noqa: B006
    repeats: Annotated[
        int, typer.Option(min=1, help="streams: how often each row is measured, interleaved.")
    ] = REPEATS,
    stream_counts: Annotated[
        str, typer.Option("--streams", help="streams: only these rows, as in '16,256'.")
    ] = "",
    against: Annotated[
        list[Path],
        typer.Option(
            exists=True,
            help="Also measure this changed copy of loadtests/locustfile.py, in turn with it.",
        ),
    ] = [],  # noqa: B006
    processes: Annotated[
        list[int],
        typer.Option(
            min=1, help="streams: by so many load processes, in turn; the odd shapes by one alone."
        ),
    ] = list(PROCESSES),  # noqa: B006
    pairs: Annotated[
        int, typer.Option(min=1, help="engine, neighbour, recording: runs of each side, in turn.")
    ] = PAIRS,
    runs: Annotated[
        int, typer.Option(min=1, help="aa: how often a lab runs against itself.")
    ] = RUNS,
    unpinned: Annotated[
        bool,
        typer.Option(help="engine: also run vLLM's tool free to use the engine's cores."),
    ] = False,
    keep: Annotated[
        Path | None, typer.Option(help="Keep records, truth and logs in this new folder.")
    ] = None,
) -> None:
    """Measure the lab's own instruments and print each figure beside its aim.

    [bold]streams[/] (4 min): what our Locust adds to TTFT and to chunk gaps,
    and the CPU it costs, against a server that records what it really sent.

    [bold]engine[/] (3 min): vLLM's throughput under our Locust and under
    `vllm bench serve`: the same requests, in turns on one engine.

    [bold]neighbour[/] (3 min): an engine's throughput beside another that is
    loaded and idle, as variants of a lab are, and beside one held still.

    [bold]recording[/] (2 min): the share of our Locust's CPU time that goes
    into recording for Prometheus at 10,000 tokens/s.

    [bold]overhead[/] (at once): the lab's own share of the newest full run
    in results/.

    [bold]aa[/] (8 min, only when asked for): twenty runs of a lab against
    itself on a fake engine whose speed varies; the false alarms among them.

    The figures are this machine's, now: close what else runs on it. What a
    part finds is kept in results/ as soon as it is there, unless fewer repeats,
    pairs or runs, or not all rows, were asked for. The exit code is 0 unless
    something broke, whatever the figures.
    """
    if unknown := set(part) - set(PARTS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    wanted = {int(n) for n in stream_counts.split(",") if n}
    programs = [p for p in PROGRAMS if not wanted or p.streams in wanted]
    if not programs:
        known = ", ".join(sorted({str(p.streams) for p in PROGRAMS}, key=int))
        raise typer.BadParameter(f"no such number: choose from {known}", param_hint="--streams")
    engine_cores, client_cores = machines.split_cores()
    console.print(
        f"{machines.detect().describe()}; server on CPU {_cores(engine_cores)}, clients on CPU"
        f" {_cores(client_cores)}"
    )
    if (load := os.getloadavg()[0]) > 0.5:
        console.print(
            f"[yellow]Other work is running (load average {load:.1f}): it is in these figures.[/]"
        )
    files = [generator.LOCUSTFILE, *against]
    senders = [(file, n) for file in files for n in processes]
    expected_s = {
        "streams": 10 + TRIAL_S * repeats * len(streams.cases_of(programs, senders)),
        "engine": 60 + 30 * pairs,
        "neighbour": 60 + 30 * pairs,
        "recording": 10 + 2 * TRIAL_S * pairs,
        "overhead": 1,
        "aa": 22 * runs,
    }
    clock = Clock({name: expected_s[name] for name in PARTS if name in part})
    ordinary = {
        "streams": programs == list(PROGRAMS)
        and processes == list(PROCESSES)
        and repeats >= REPEATS,
        "engine": pairs >= PAIRS,
        "neighbour": pairs >= PAIRS,
        "recording": pairs >= PAIRS,
        "overhead": True,
        "aa": runs >= RUNS,
    }
    failed = False
    with contextlib.ExitStack() as exits:
        if keep:
            keep.mkdir(parents=True)
        work = keep or Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="lab-bench-")))
        measure: dict[str, Callable[[], instruments.Part | None]] = {
            "streams": lambda: streams.measure(clock, work / "streams", repeats, programs, senders),
            "engine": lambda: engine.measure(clock, work / "engine", pairs, unpinned, files),
            "neighbour": lambda: neighbour.measure(clock, work / "neighbour", pairs),
            "recording": lambda: recording.measure(clock, work / "recording", pairs),
            "overhead": overhead.measure,
            "aa": lambda: aa.measure(clock, work / "aa", runs),
        }
        for name in (name for name in PARTS if name in part):
            others = Others()
            try:
                with clock.during(name):
                    part_found = measure[name]()
            except (BenchError, EngineError, generator.GeneratorError, models.ModelError) as error:
                console.print(f"[red]{name}: {escape(str(error))}[/]")  # the other parts go on
                failed = True
                continue
            if part_found and ordinary[name] and not against:
                kept = instruments.keep(machines.detect(), name, dated(part_found, others))
                console.print(f"[dim]{name}: kept in {os.path.relpath(kept)}[/]")
    if failed:
        raise typer.Exit(1)


def dated(part: instruments.Part, others: Others) -> instruments.Part:
    """Add the day, and what others took of the CPU except where the part was read from a file."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    taken = 0.0 if isinstance(part, instruments.Overhead) else sum(others.shares())
    return part.model_copy(update={"measured_at": now, "cpu_others": taken})


def _cores(cores: Sequence[int]) -> str:
    return ",".join(map(str, cores))


if __name__ == "__main__":
    app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
