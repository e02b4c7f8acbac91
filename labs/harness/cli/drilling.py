"""The command `drill`: a reader names what is wrong with an engine that runs here."""

from __future__ import annotations

import random
import select
import sys
from collections.abc import Iterator, Sequence

from labs.harness.analysis.diagnosis import Reading
from labs.harness.cli.options import changes_of, command, command_words, require_known
from labs.harness.cli.terminal import ConsoleProgress, console, raise_if_stopped, show
from labs.harness.plan.resolve import RunRequest, is_dummy
from labs.harness.reports import diagnoses
from labs.harness.reports.diagnoses import Case
from labs.harness.runner import drill
from serving.hardware import machine
from serving.models import catalog

NEXT, AGAIN = "Enter for the next round, q to quit: ", "A number or a name of the list, or q: "
QUIT = ("q", "quit")
POLL_S = 0.1  # for a line that was typed


class Blindfolded(ConsoleProgress):
    """Shows how far a drill is, and nothing that would tell what is sent."""

    def expect(self, remaining_s: float) -> None:
        raise_if_stopped()

    def part_done(self, text: str, remaining_s: float) -> None:
        raise_if_stopped()

    def waiting(self, text: str) -> None:
        super().waiting(text.partition(",")[0])


@command("drill", needs_vllm=True)
def run_drill(
    answer: str = "",
    seed: str = "",
    set_: str = "",
    model: str = "",
    weights: str = "",
    engine_command: str = "",
) -> None:
    """Name what is wrong with an engine that runs here, from its metrics.

    An engine is started under a steady load, with a cause of bad latency in force, or none. Watch
    it on the page of Prometheus, whose address is printed, and name the cause: you are told what
    gives it away, and what the rule of `diagnose` would have said. The load goes on until you
    answer. Without a terminal, or with ANSWER=, nothing is asked. Nothing is filed.
    """
    changes = changes_of(set_, seed=seed)
    scale = catalog.scale_of(machine.detect())
    lab = drill.drilled_lab().at(scale, False, changes, is_dummy(weights))
    causes = drill.causes(lab)
    names = [*causes.values()]
    if answer:
        require_known("ANSWER", answer, names)
    asks = not answer and sys.stdin.isatty()
    order = random.Random(seed or None).sample([*causes], len(causes))
    request = RunRequest(
        lab=lab, model=model, weights=weights, engine_command=command_words(engine_command)
    )
    progress, right = Blindfolded(), 0
    with drill.drilling(request, order[: None if asks else 1], progress) as ready:
        for number, name in enumerate(ready.causes, 1):
            readings = ready.readings(name)
            with progress:
                now = next(readings)
            if asks:
                show(diagnoses.asked(name, names, ready.page_url))
                now, answer = _answered(readings, now, names)
                if answer in QUIT:
                    break
            case = Case.of(ready.blind(name, now), "")
            right += answer == case.cause
            show(diagnoses.answered(case, answer, right, number))
            if not asks or number == len(order) or _line(NEXT) in QUIT:
                break


def _answered(
    readings: Iterator[Reading], now: Reading, names: Sequence[str]
) -> tuple[Reading, str]:
    """Keep the load on until a cause is named, or q; return all that was counted, and that."""
    by_number = {str(number): name for number, name in enumerate(names, 1)}
    while True:
        console.print(AGAIN, end="")
        while not select.select([sys.stdin], [], [], POLL_S)[0]:
            now = next(readings)
        typed = _line()
        if (given := by_number.get(typed, typed)) in (*names, *QUIT):
            return now, given


def _line(asked: str = "") -> str:
    """Read a line; its end, Ctrl-D, is q."""
    console.print(asked, end="")
    line = sys.stdin.readline()
    raise_if_stopped()
    return line.strip() if line else QUIT[0]
