"""Finds what is wrong with a trial or a comparison: caveats, each with a name and advice.

All checks stand in `checks.toml`, each with its name, what it blocks and its text. What finds a
fault is a function in `checks/` that yields, for each fault, the figures that the text has places
for. A new check is a new row, and such a function.

A caveat that blocks allows no verdict. Two kinds of faults are told apart. A **disturbance** may be
gone in another attempt: a late client, another process, an engine that slows down. A fault of the
**set-up** would be there again: a treatment that the engine does not show, answers of another
length. What a check needs and cannot read blocks too, by name: missing evidence proves nothing.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from labs.harness.analysis.checks import answers, load, machine, run, transport, treatment, trend
from labs.harness.analysis.checks.expected import Expected, Found
from labs.harness.analysis.machine_speed import TimedTrial, machine_speed
from labs.harness.analysis.measure import Trial
from labs.harness.analysis.metrics import METRICS
from labs.harness.analysis.verdicts import Caveat

TOKEN_TIMES, OVER_LONG_PROMPTS = "times between tokens", "figures taken over long prompts"
OVER_REQUESTS, BY_CLIENTS = "figures taken over requests", "figures taken by clients"
BLOCKED = {  # what a row may block, by the words for it
    TOKEN_TIMES: tuple(name for name, metric in METRICS.items() if metric.token_times),
    OVER_LONG_PROMPTS: tuple(n for n, m in METRICS.items() if m.statistic.per == "long prompt"),
    OVER_REQUESTS: tuple(
        name
        for name, metric in METRICS.items()
        if not metric.by_engine and metric.statistic.per in ("request", "trial")
    ),
    BY_CLIENTS: tuple(name for name, metric in METRICS.items() if not metric.by_engine),
}


@dataclass(frozen=True)
class Check:
    """A row of the table: a fault that is looked for, and how it is said."""

    found: Callable[..., Found]
    name: str
    text: str
    blocks: bool = True
    metrics: str | None = None  # the words for those that it blocks; None: all

    def caveats(self, point: str | None, *subject: object) -> Iterator[Caveat]:
        """Say each fault that is found in a subject, such as a trial."""
        for figures in self.found(*subject):
            yield Caveat(
                name=self.name.format(**figures),
                text=self.text.format(**figures),
                blocks=self.blocks,
                point=point,
                metrics=BLOCKED[self.metrics] if self.metrics else (),
            )


MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (answers, load, machine, run, transport, treatment, trend)
}
TABLE = tomllib.loads(Path(__file__).with_name("checks.toml").read_text())
CHECKS = {
    group: [
        Check(getattr(MODULES[module], function), **row)
        for module, functions in modules.items()
        for function, row in functions.items()
    ]
    for group, modules in TABLE.items()
}
SERVER_BUSY: str = TABLE["requests"]["machine"]["server_busy"]["name"]


def check(group: str, point: str | None, *subject: object) -> list[Caveat]:
    """List what the checks of a group find in a subject."""
    return [caveat for row in CHECKS[group] for caveat in row.caveats(point, *subject)]


def caveats_of(trial: Trial, expected: Expected) -> list[Caveat]:
    """List what is wrong with one trial; the evidence may include that of other variants."""
    return [*disturbances_of(trial, expected), *faults_of_set_up(trial, expected)]


def disturbances_of(trial: Trial, expected: Expected) -> list[Caveat]:
    """List what may be otherwise in another attempt at this trial."""
    load_checked = ["load"] if trial.measured_requests else []
    return _of_trial(["failures", *load_checked, "other-work"], trial, expected)


def faults_of_set_up(trial: Trial, expected: Expected) -> list[Caveat]:
    """List what would be the same in another attempt at this trial."""
    groups = ["window"]
    if trial.measured_requests:
        groups.append("requests")
        if trial.engine:
            groups.append("cache")
            if not expected.endpoint:  # its engine was not configured here: nothing is to be proved
                groups.append("treatment")
    return _of_trial(groups, trial, expected)


def _of_trial(groups: Sequence[str], trial: Trial, expected: Expected) -> list[Caveat]:
    return [c for group in groups for c in check(group, trial.point.key, trial, expected)]


def undisturbed_transport_s(
    trial: Trial, timed: TimedTrial | None, expected: Expected
) -> float | None:
    """Measure how long transport takes as `transport_s` does, if nothing disturbed the trial.

    None for more than one stream, too. Whether it was disturbed is judged without what transport
    took in others, so that their order does not matter.
    """
    if not transport.is_one_stream(trial.point) or (
        timed and check("speed-within", timed.point, timed)
    ):
        return None
    alone = replace(expected, transport_s={})
    disturbed = any(caveat.blocks for caveat in disturbances_of(trial, alone))
    return None if disturbed else transport.transport_s(trial)


def speed_jumped(trials: Sequence[TimedTrial]) -> list[Caveat]:
    """Name the trials around which the machine's own speed jumped, by its reference steps."""
    whole = machine_speed(trials)
    return [caveat for t in trials for caveat in check("speed", t.point, t, whole)]
