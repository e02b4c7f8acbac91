"""The command line: `python -m bench --help`."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bench import (
    BenchError,
    aa,
    engine,
    fleet,
    neighbour,
    overhead,
    recording,
    server,
    soak,
    streams,
    truth,
)
from bench.clock import Clock
from bench.console import console
from bench.truth import PROGRAMS
from labs.harness.running.machine_load import OtherLoad
from labs.harness.telling import instruments
from loadtests import generator
from serving.engines.base import EngineError
from serving.hardware import machine as machines
from serving.weights import models

MAIN = ("streams", "engine", "neighbour", "recording", "overhead")
PARTS = (*MAIN, "aa", "twins", "soak", "fleet", "server")
REPEATS, PROCESSES, PAIRS, RUNS, MINUTES = 2, (1, 2), 4, 20, 60
TRIAL_S = 9.0  # a truth server's start, warm-up, window and drain


HELP = """Measure the lab's own instruments and print each figure beside its aim.

[bold]streams[/] (4 min): what our Locust adds to TTFT and to chunk gaps,
and the CPU it costs, against a server that records what it really sent.

[bold]engine[/] (3 min): vLLM's throughput under our Locust and under
`vllm bench serve`: the same requests, in turns on one engine.

[bold]neighbour[/] (3 min): an engine's throughput beside another that is
loaded and idle, and beside one that is suspended, as in a lab on a CPU.

[bold]recording[/] (2 min): the share of our Locust's CPU time that goes
into recording for Prometheus at 10,000 tokens/s.

[bold]overhead[/] (at once): the lab's own share of the newest full run
in results/.

[bold]aa[/] (8 min, only when asked for): twenty runs of a lab against
itself on a fake engine whose speed varies; the false alarms among them.

[bold]twins[/] (14 min, only when asked for, on a CPU): twenty pairs of
trials of a lab against itself, on two real engines side by side, judged
five by five; the false alarms among them.

[bold]soak[/] (an hour, only when asked for): how our Locust's memory
grows from minute to minute under steady load.

[bold]fleet[/] (2 min, only when asked for): how the time to play a fleet
in virtual time grows, as `make plan` does, on one core.

[bold]server[/] (3 min, only when asked for): the CPU time that vLLM's own API
server takes for a chunk, in front of an engine that computes nothing.

The figures are this machine's, now: close what else runs on it. What a
part finds is kept in results/ as soon as it is there, unless fewer repeats,
pairs, runs or minutes, or not all rows, were asked for. The exit code is 0 unless
something broke, whatever the figures.
"""


@dataclass(frozen=True)
class Plan:
    """Holds what is measured, and how often."""

    parts: Sequence[str]
    programs: Sequence[truth.Program]
    locustfiles: Sequence[Path]  # the lab's own, then those that are measured against it
    processes: Sequence[int]
    repeats: int
    pairs: int
    runs: int
    minutes: int
    unpinned: bool

    @property
    def senders(self) -> list[streams.Sender]:
        """Every locustfile with every number of load processes."""
        return [(file, n) for file in self.locustfiles for n in self.processes]

    def expected_s(self) -> dict[str, float]:
        """Estimate the seconds that each part takes."""
        cases = streams.cases_of(self.programs, self.senders)
        expected_s = {
            "streams": 10 + TRIAL_S * self.repeats * len(cases),
            "engine": 60 + 30 * self.pairs,
            "neighbour": 60 + 30 * self.pairs,
            "recording": 10 + 2 * TRIAL_S * self.pairs,
            "overhead": 1,
            "aa": 22 * self.runs,
            "twins": aa.TWINS_START_S + aa.TWINS_PAIR_S * self.runs,
            "soak": 10 + soak.MINUTE_S * self.minutes,
            "fleet": fleet.EXPECTED_S,
            "server": server.EXPECTED_S,
        }
        return {name: expected_s[name] for name in self.parts}

    def is_ordinary(self, part: str) -> bool:
        """Tell whether a part is measured in full and without changed files: then it is kept."""
        if len(self.locustfiles) > 1:
            return False
        if part == "streams":
            in_full = list(self.processes) == list(PROCESSES) and self.repeats >= REPEATS
            return in_full and list(self.programs) == list(PROGRAMS)
        if part in ("aa", "twins"):
            return self.runs >= RUNS
        if part == "soak":
            return self.minutes >= MINUTES
        return part in ("overhead", "fleet", "server") or self.pairs >= PAIRS

    def measurements(
        self, clock: Clock, work: Path
    ) -> dict[str, Callable[[], instruments.Part | None]]:
        """Return what measures each part; its records and logs go to a folder in `work`."""
        return {
            "streams": lambda: streams.measure(
                clock, work / "streams", self.repeats, self.programs, self.senders
            ),
            "engine": lambda: engine.measure(
                clock, work / "engine", self.pairs, self.unpinned, self.locustfiles
            ),
            "neighbour": lambda: neighbour.measure(clock, work / "neighbour", self.pairs),
            "recording": lambda: recording.measure(clock, work / "recording", self.pairs),
            "overhead": overhead.measure,
            "aa": lambda: aa.measure(clock, work / "aa", self.runs),
            "twins": lambda: aa.measure_twins(clock, work / "twins", self.runs),
            "soak": lambda: soak.measure(clock, work / "soak", self.minutes),
            "fleet": lambda: fleet.measure(clock, work / "fleet"),
            "server": lambda: server.measure(clock, work / "server"),
        }


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
            help="Also measure the load generator of this other loadtests/locustfile.py, in turn"
            " with ours; it imports the loadtests/ that it lies in.",
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
        int,
        typer.Option(
            min=1, help="aa: how often a lab runs against itself; twins: pairs of trials."
        ),
    ] = RUNS,
    minutes: Annotated[
        int, typer.Option(min=soak.LEAST_MINUTES, help="soak: how long it lasts.")
    ] = MINUTES,
    unpinned: Annotated[
        bool,
        typer.Option(help="engine: also run vLLM's tool free to use the engine's cores."),
    ] = False,
    keep: Annotated[
        Path | None, typer.Option(help="Keep records, truth and logs in this new folder.")
    ] = None,
) -> None:
    """Measure the chosen parts; the command's help text is `HELP`."""
    if unknown := set(part) - set(PARTS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    plan = Plan(
        parts=[name for name in PARTS if name in part],
        programs=_programs_of(stream_counts),
        locustfiles=[generator.LOCUSTFILE, *against],
        processes=processes,
        repeats=repeats,
        pairs=pairs,
        runs=runs,
        minutes=minutes,
        unpinned=unpinned,
    )
    _show_machine()
    with contextlib.ExitStack() as exits:
        if keep:
            keep.mkdir(parents=True)
        work = keep or Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="lab-bench-")))
        failed = _measure_parts(plan, work)
    if failed:
        raise typer.Exit(1)


def _programs_of(stream_counts: str) -> list[truth.Program]:
    """Select programs by their streams, as in '16,256'; all of them by ''."""
    counts = {int(n) for n in stream_counts.split(",") if n}
    programs = [p for p in PROGRAMS if not counts or p.streams in counts]
    if not programs:
        choices = ", ".join(sorted({str(p.streams) for p in PROGRAMS}, key=int))
        raise typer.BadParameter(f"no such number: choose from {choices}", param_hint="--streams")
    return programs


def _show_machine() -> None:
    engine_cores, client_cores = machines.split_cores()
    console.print(
        f"{machines.detect().describe()}; server on CPU {_cores(engine_cores)}, clients on CPU"
        f" {_cores(client_cores)}"
    )
    if (load := os.getloadavg()[0]) > 0.5:
        console.print(
            f"[yellow]Other work is running (load average {load:.1f}): it is in these figures.[/]"
        )


def _measure_parts(plan: Plan, work: Path) -> list[str]:
    """Measure part by part and keep each figure at once; return the parts that failed."""
    failed = []
    clock = Clock(plan.expected_s())
    measurements = plan.measurements(clock, work)
    for name in plan.parts:
        other_load = OtherLoad()
        try:
            with clock.during(name):
                figures = measurements[name]()
        except (BenchError, EngineError, generator.GeneratorError, models.ModelError) as error:
            console.print(f"[red]{name}: {escape(str(error))}[/]")  # the other parts go on
            failed.append(name)
            continue
        if figures and plan.is_ordinary(name):
            path = instruments.keep(machines.detect(), name, dated(figures, other_load))
            console.print(f"[dim]{name}: kept in {os.path.relpath(path)}[/]")
    return failed


def dated(part: instruments.Part, other_load: OtherLoad) -> instruments.Part:
    """Add the time, and the share of the CPU that other work took: 0 for a part read from files."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    taken = 0.0 if isinstance(part, instruments.Overhead) else sum(other_load.shares()[:2])
    return part.model_copy(update={"measured_at": now, "cpu_others": taken})


def _cores(cores: Sequence[int]) -> str:
    return ",".join(map(str, cores))


if __name__ == "__main__":
    app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)
    app.command(help=HELP)(main)
    app()
