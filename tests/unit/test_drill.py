"""A drill: what may be wrong on a machine, under which names, and how a reader answers."""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Iterator

import pytest

from labs.harness.analysis.diagnosis import Reading
from labs.harness.cli import drilling
from labs.harness.derived.lab_modules import BlindTrial
from labs.harness.reports import diagnoses
from labs.harness.reports.diagnoses import Case
from labs.harness.runner import drill
from serving import metrics
from serving.metrics import Histogram, Snapshot

LAB = drill.drilled_lab()
SEEN = Reading(Snapshot({metrics.REQUESTS: 9.0}, {}, {}))


@pytest.mark.parametrize(
    ("scale", "dummy", "lacks"),
    [
        ("cpu", False, {"slow step"}),
        ("gpu-80", False, set()),
        ("gpu-80", True, {"speculation"}),
    ],
)
def test_what_can_be_wrong_is_what_the_lab_has_there(
    scale: str, dummy: bool, lacks: set[str]
) -> None:
    found = set(drill.causes(LAB.at(scale, False, dummy=dummy)).values())
    assert found == {*drill.injections().causes.values()} - lacks


def test_a_drill_has_the_labs_own_points_under_names_that_tell_nothing() -> None:
    lab = LAB.at("cpu", False)
    places = {f"round-{n}": place for n, place in enumerate(drill.causes(lab))}
    shown = drill.disguised(lab, places).at("cpu", False)
    flags = {v.name: shown.flags_of(v) for v in shown.variants}
    own = {v.name: lab.flags_of(v) for v in lab.variants}
    sent = {w.name: w for w in shown.workloads}
    own_sent = {w.name: w for w in lab.workloads}
    for name, (variant, workload) in places.items():
        assert flags[name] == own[variant]
        assert sent[name].model_copy(update={"name": workload, "only": ()}) == own_sent[
            workload
        ].model_copy(update={"only": ()})
    assert {*flags} == {*sent} == {drill.REFERENCE, *places}
    assert all(w.only == (w.name,) for w in shown.workloads)


def test_the_load_goes_on_until_a_cause_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """By number or by name; what is neither is asked for again, and the end of input is q."""
    reading, writing = os.pipe()
    played = itertools.count(1)

    def readings(lines: list[str]) -> Iterator[Reading]:
        for number in played:
            if number > 2 and lines:
                os.write(writing, lines.pop(0).encode())
            yield SEEN

    with os.fdopen(reading) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        names = ["healthy", "burst"]
        for typed, named in ((["7\n", "2\n"], "burst"), (["healthy\n"], "healthy")):
            assert drilling._answered(readings(typed), SEEN, names) == (SEEN, named)
        assert next(played) > 3
        os.close(writing)
        assert drilling._answered(readings([]), SEEN, names) == (SEEN, "q")


def reading(requests: float, hits: float, ttft_s: float) -> Reading:
    """What an engine may have counted, of a prefix cache and of first tokens."""
    ttft = Histogram((1.0, math.inf), (requests, requests), requests * ttft_s, requests)
    values = {
        metrics.REQUESTS: requests, metrics.PREFIX_QUERIES: 100.0, metrics.PREFIX_HITS: 100 * hits
    }  # fmt: skip
    return Reading(Snapshot(values, {metrics.TTFT: ttft}, {}))


@pytest.mark.parametrize("answer", ["", "cold cache", "burst"])
def test_what_was_wrong_is_told_with_the_figures_and_what_the_rule_said(answer: str) -> None:
    now, healthy = reading(20, 0.1, 0.3), reading(40, 0.6, 0.1)
    foretold = drill.injections().foretold["cold cache"]
    case = Case.of(BlindTrial("cold cache", now, healthy, foretold), "")
    said = diagnoses.answered(case, answer, right=int(answer == "cold cache"), rounds=1)
    assert "cold cache" in said
    assert "60%" in said
    assert "10%" in said
    assert ("burst" in said) == (answer == "burst")
    assert ("1 of 1" in said) == (answer == "cold cache")


def test_every_cause_that_can_be_asked_for_has_words() -> None:
    names = [*drill.injections().causes.values()]
    asked = diagnoses.asked("round-1", names, "http://127.0.0.1:1/user/")
    rows = [line for line in asked.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[1] for row in rows[2:]] == names
    assert all(len(row.split(" | ")[0]) > 9 for row in rows[2:])
