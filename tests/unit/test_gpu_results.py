"""What becomes of the results of a short sitting on a GPU: quick runs, with random weights."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from labs.harness.analysis.computed import Band, PointForecasts
from labs.harness.comparison import compare, side_by_side
from labs.harness.comparison.on_file import OnFile
from labs.harness.derived.lab_modules import Headline, ReportParts
from labs.harness.derived.summarize import summarise
from labs.harness.reports import markdown, residuals
from labs.harness.reports.document import parts, plain_text
from labs.harness.reports.markdown import Markdown
from labs.harness.reports.residuals import Scores
from labs.harness.site import leaderboards, site
from labs.harness.site.site import Course, Entry
from labs.harness.spec.page import read
from labs.harness.storage import results
from labs.harness.storage.newest import newest_runs
from labs.harness.storage.recorded import MachineFile
from labs.harness.storage.results import RunFolder, all_runs
from labs.harness.storage.writing import write_json
from serving.hardware.machine import Machine
from tests.unit.builders import MACHINE, _changed, make_lab, write_run
from tests.unit.judged import page_says

GPU = Machine(kind="gpu", model="NVIDIA Soroban 80GB", count=1, memory_bytes=80 * 2**30)
TOLD = GPU.describe()
MARKED = "(random weights) (quick)"


@pytest.fixture
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A full run on a CPU, whose name precedes that of the GPU, and is older than all others."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(leaderboards, "LABS", {"tiny": make_lab()})
    headline = Headline(claim="faster", done="Turning it on", figure="the throughput")
    monkeypatch.setattr(leaderboards, "parts_of", lambda lab: ReportParts(headline=headline))
    page = read("# Tiny\n\nHow often?\n\n## Answers\n\n### SO-4\n\nOften.\n")
    monkeypatch.setattr("labs.harness.reports.rendering.page_of", lambda lab: page)
    folder = write_run(tmp_path)
    assert MACHINE.slug < GPU.slug
    keys = list(folder.summary().measurements)
    bands = {"tpot_mean_s": Band(value=1.0, low=0.9, high=1.1)}
    forecasts = PointForecasts(points=dict.fromkeys(keys, bands))
    before = folder.predictions().model_copy(update={"in_virtual_time": forecasts})
    write_json(folder.path / "predictions.json", before)
    page_says(monkeypatch, "## Answers\n\n### SO-4\n\nOften.\n")
    write_json(folder.path / "summary.json", summarise(folder).model_copy(update={"caveats": []}))
    return folder


@pytest.fixture
def quick(cpu: RunFolder) -> RunFolder:
    return on_gpu(cpu, "20260102", quick=True, dummy=True)


def on_gpu(folder: RunFolder, day: str, **fields: Any) -> RunFolder:
    return _changed(folder, day, machine=GPU, **fields)


def names(runs: list[RunFolder]) -> list[str]:
    return [folder.path.name[:8] for folder in runs]


def test_a_quick_run_of_a_gpu_stands_in_where_there_is_no_full_one(
    cpu: RunFolder, quick: RunFolder
) -> None:
    assert newest_runs()[0].path == quick.path
    assert names(newest_runs()) == names(newest_runs(committed=True)) == ["20260102", "20260101"]
    on_gpu(cpu, "20260103", quick=True, changes={"repeats": 9})  # ad hoc, in no table
    _changed(cpu, "20260104", quick=True)  # on the CPU
    assert names(newest_runs()) == ["20260102", "20260101"]
    on_gpu(cpu, "20260105", quick=True)
    assert names(newest_runs()) == ["20260105", "20260101"]
    on_gpu(cpu, "20250101", dummy=True)  # full, and however old
    assert names(newest_runs()) == ["20250101", "20260101"]
    on_gpu(cpu, "20250102")
    on_gpu(cpu, "20260106", quick=True)
    assert names(newest_runs()) == ["20250102", "20260101"]


def test_two_gpus_are_compared_by_what_stands_in_with_a_caveat(
    cpu: RunFolder, quick: RunFolder
) -> None:
    other = GPU.model_copy(update={"count": 2})
    beside = _changed(quick, "20260103", machine=other)
    for folder in (quick, beside):
        write_json(folder.path.parents[1] / "machine.json", MachineFile(
            machine=folder.run().machine, ceilings=folder.run().ceilings
        ))  # fmt: skip
    a, b = (str(folder.path.parents[1]) for folder in (quick, beside))
    comparisons, refused = compare.compare_named(a, b, force=True)
    assert "quick run" in markdown.document(side_by_side.document(comparisons, refused))


def test_a_gpu_comes_first_in_every_table_and_its_quick_runs_are_marked(
    cpu: RunFolder, quick: RunFolder
) -> None:
    def collection(*folders: RunFolder) -> str:
        return leaderboards.collection([OnFile(folder) for folder in folders], [])

    claims = leaderboards.claims([OnFile(folder) for folder in newest_runs()], committed=False)
    assert [claim.run.folder.path for claim in claims] == [quick.path, cpu.path] * 2
    assert {claim.run.marks for claim in claims} == {f" {MARKED}", ""}
    text = collection(*newest_runs())
    assert text.index(f"[{TOLD}](") < text.index(f"[{MACHINE.describe()}](")
    assert (text.count("*(quick)*: "), text.count("*(random weights)*: ")) == (1, 1)
    assert "*(quick)*" not in collection(cpu)
    told = collection(cpu, on_gpu(cpu, "20260107", dummy=True))
    assert (told.count("*(quick)*"), told.count("*(random weights)*: ")) == (0, 1)
    page = leaderboards.machine_page([OnFile(quick)], committed=True)
    assert page.count(MARKED) == 1 + 2 + 1  # its row, its claims, its answer
    assert "*(quick)*" in page


README = "<!-- findings: generated by `labs readme` -->\n<!-- /findings -->"


def test_the_front_page_says_whether_a_gpu_is_behind_its_findings_and_names_it(
    cpu: RunFolder, quick: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def front(*runs: RunFolder) -> str:
        return leaderboards.generated_parts(README, [OnFile(folder) for folder in runs])

    def marks(*runs: RunFolder) -> list[bool]:
        return [mark in front(*runs) for mark in ("*(quick)*: ", "*(random weights)*: ")]

    assert "2.97 times" in front(cpu)
    assert "no result from a GPU" in front(cpu)
    assert "on GPUs" in front(cpu, quick)
    assert f" on Soroban 80GB {MARKED}: 2.97 times" in front(cpu, quick)
    assert marks(cpu) == [False, False]
    assert marks(cpu, quick) == [True, True]
    assert marks(cpu, on_gpu(cpu, "20260107", dummy=True)) == [False, True]
    full = _changed(cpu, "20250101", machine=GPU.model_copy(update={"count": 2}))
    assert " on Soroban 80GB: 2.97 times" in front(cpu, full, quick)
    summary = quick.summary()
    undecided = [j.model_copy(update={"expected": None}) for j in summary.judgements]
    write_json(quick.path / "summary.json", summary.model_copy(update={"judgements": undecided}))
    assert "Measured on CPUs with two cores. In" in front(cpu, quick)
    assert marks(cpu, quick) == [False, False]  # none is there
    (quick.path / "sweep.svg").touch()  # its plot is shown, with its marks
    assert "Measured on CPUs with two cores. In" in front(cpu, quick)
    assert marks(cpu, quick) == [True, True]
    many = _changed(cpu, "20260110", machine=MACHINE.model_copy(update={"count": 64}))
    assert "two cores" in front(cpu)
    assert "two cores" not in front(many)


APART = "Apart: quick runs and random weights on GPUs"


def tables(document: Markdown, title: str) -> list[list[list[str]]]:
    """The rows of the tables under a heading, as a reader reads them."""
    (found,) = (part for part in parts(document)[2] if parts(part)[0] == title)
    return [
        [
            [plain_text(Markdown(cell)) for cell in row.strip("| ").split(" | ")]
            for row in block.splitlines()[2:]
        ]
        for block in found.split("\n\n")
        if block.startswith("|")
    ]


def test_forecasts_of_quick_runs_on_gpus_are_scored_apart_and_marked(
    cpu: RunFolder, quick: RunFolder
) -> None:
    _changed(cpu, "20260104", quick=True)  # on the CPU
    on_gpu(cpu, "20260105", changes={"repeats": 9})
    scores = Scores.of(all_runs())
    assert {r.folder.path for r in scores.apart} == {quick.path}
    assert {r.folder.path for r in scores.reported} == {cpu.path}
    link = residuals.to_reports(results.RESULTS)
    page = residuals.page(replace(scores, kept=()), link)
    by_figure, by_run, misses = tables(page, APART)
    assert by_figure
    assert {row[0] for row in by_figure} == {f"NVIDIA Soroban 80GB {MARKED}"}
    assert {row[2] for row in [*by_run, *misses]} == {f"20260102 {MARKED}"}
    without = residuals.page(Scores(scores.reported), link)
    assert page.startswith(without)
    assert f"## {APART}" not in without
    assert APART in leaderboards._pages()[results.RESULTS / leaderboards.FORECASTS]


def entry(folder: RunFolder) -> Entry:
    machine, lab, name = folder.path.parts[-3:]
    return Entry(folder, folder.run(), folder.summary(), f"{machine}/{lab}/{name}.html")


def test_the_site_shows_a_quick_run_of_a_gpu_first_and_marked(
    cpu: RunFolder, quick: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "LABS", {"tiny": make_lab()})
    course = Course([entry(cpu), entry(quick)])
    assert [e.folder.path for e in course.newest] == [quick.path, cpu.path]
    (item,) = course.lessons
    lesson, pages = course.lesson_page(item), course.pages()
    for text in (lesson, pages["machines.html"]):
        assert "a quick one stands in" in text
        assert text.index(f"{TOLD} {MARKED}") < text.index(MACHINE.describe())
    assert f"{TOLD} {MARKED}" in pages["index.html"]
    assert f"Soroban 80GB {MARKED}" in pages["questions.html"]
    assert not re.search(rf"{TOLD}(?! \(random weights\))", pages["index.html"])
    machines = pages["machines.html"].partition('<section id="machines">')[2]
    assert machines.index(TOLD) < machines.index(MACHINE.describe())
    assert APART in pages["forecasts.html"]
    alone = Course([entry(cpu)])
    texts = [alone.lesson_page(alone.lessons[0]), *alone.pages().values()]
    assert not any("stands in" in text or "(quick)" in text for text in texts)


def test_the_page_of_forecasts_has_what_is_scored_apart_where_nothing_else_is(
    quick: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "LABS", {"tiny": make_lab()})
    text = Course([entry(quick)]).forecasts_page()
    assert f"{APART}</h2>" in text
    assert "No full run" in text
