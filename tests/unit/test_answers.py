"""What a run says to each question of its lab."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labs import LABS
from labs.harness.analysis.metrics import METRICS
from labs.harness.reports import plots
from labs.harness.reports.drawing import plt
from labs.harness.reports.rendering import told
from labs.harness.spec.lab import Lab, LabError, Point
from tests.unit.builders import CEILINGS, SHAPE
from tests.unit.judged import ABOUT, context, judged_run, told_of, with_facts


@pytest.mark.parametrize("lab", LABS.values(), ids=LABS)
def test_a_run_of_which_nothing_came_invents_nothing(lab: Lab, tmp_path: Path) -> None:
    """What a cache holds is arithmetic, and what training does was not run: both say so."""
    lab = lab.model_copy(update={"requests": 64})
    run = judged_run(context(tmp_path, lab, {}, about=ABOUT))
    given = {id: str(blocks) for id, blocks in told_of(run).answers.items()}
    assert given.keys() <= {"KV-2", "KV-3", "KV-7", "CO-5", "CO-8"}
    assert not [text for text in given.values() if "(measured" in text]


def kept_in_part(lab: Lab) -> Iterator[dict[str, Any]]:
    """Settings that leave out one variant, workload or load, or all but one."""
    for field in ("variants", "workloads"):
        names = [part.name for part in getattr(lab, field)]
        for name in names:
            yield {field: [name]}
            yield {field: [other for other in names if other != name]}
    for workload in lab.workloads:
        if len(workload.loads) > 1:
            yield {f"workloads.{workload.name}.loads": [str(workload.loads[0])]}
        served = list(workload.only or [v.name for v in lab.variants])
        yield {f"workloads.{workload.name}.only": served[1:]}


SIZES = {
    "cpu": ("cpu", False, False),
    "gpu-quick": ("gpu-80", True, False),
    "gpu-quick-random": ("gpu-80", True, True),
}


def sizes_that_differ(name: str) -> Iterator[str]:
    """The sizes in which a lab is not what it is in the one before."""
    before: dict[str, Any] = {}
    for size, (scale, quick, dummy) in SIZES.items():
        resolved = LABS[name].at(scale, quick, dummy=dummy).resolved()
        if resolved != before:
            yield size
        before = resolved


def left_of(name: str, size: str) -> Iterator[tuple[Lab, list[Point]]]:
    """Each part of a lab in that size which a reader may keep, with few requests, and its points.

    Its figures are given, so that these are enough for the lengths.
    """
    scale, quick, dummy = SIZES[size]
    left = list[Any]()
    for changes in ({}, *kept_in_part(LABS[name].at(scale, quick, dummy=dummy))):
        try:
            lab = LABS[name].at(scale, quick, changes, dummy)
        except LabError:  # nothing is left, or nothing that tells a capacity
            continue
        lab = lab.model_copy(update={"requests": min(lab.requests, 256)})
        points = lab.points(SHAPE, CEILINGS, {}, ABOUT)
        kept = [v.name for v in lab.variants], [p.key for p in points]
        if kept not in left:
            left.append(kept)
            yield lab, points
    assert left


@pytest.mark.parametrize("name", LABS)
def test_findings_answers_and_plots_bear_what_is_left_out(name: str, tmp_path: Path) -> None:
    """All that a reader may keep of a lab, every figure of it measured; nothing may raise.

    A quick run on a GPU does without parts of it from the beginning. What has the same parts in
    another size is told and drawn once: that takes longer than all that is computed for it.
    """
    drawn = list[Any]()
    left = ((size, *part) for size in sizes_that_differ(name) for part in left_of(name, size))
    for i, (size, lab, points) in enumerate(left):
        values = {
            p.key: {metric: 0.5 + j / 100 for metric in METRICS} for j, p in enumerate(points)
        }
        run = with_facts(judged_run(context(tmp_path / str(i), lab, values, about=ABOUT)))
        kinds = {(p.variant.name, p.workload.name, p.load.kind) for p in points}
        shown = [v.name for v in lab.variants], kinds, [*plots._drawn(lab)]
        if shown not in drawn:
            drawn.append(shown)
            found = told(run.run, run.lab, run.summary)
            assert len(found.findings) == len(lab.findings), (size, *values)
            for draw in plots._drawn(lab).values():
                draw(run)
                plt.close("all")
