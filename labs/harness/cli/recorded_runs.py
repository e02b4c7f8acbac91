"""The commands about recorded runs: report, compare, export and the like."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from difflib import unified_diff
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from dashboards import boards
from labs import LABS
from labs.harness.analysis.metrics import METRICS
from labs.harness.analysis.text import counted
from labs.harness.cli.options import command, require_clone, require_known
from labs.harness.cli.terminal import console, show, show_path, shown_path
from labs.harness.comparison import compare, reproduction, side_by_side, worse
from labs.harness.derived import score
from labs.harness.derived.summarize import all_problems, summarise
from labs.harness.plan import benchmarks
from labs.harness.reports import pages, report
from labs.harness.reports.document import bullets, section, table_of
from labs.harness.reports.markdown import Markdown
from labs.harness.site import leaderboards
from labs.harness.site.site import write_lesson, write_site
from labs.harness.spec.lab import LabError
from labs.harness.storage import export, manifest, packing
from labs.harness.storage.committed import committed_runs, is_tracked, tracked_runs
from labs.harness.storage.newest import newest_runs
from labs.harness.storage.results import RESULTS, RunFolder, all_runs, open_run, readable
from serving.models.catalog import ROOT

PANEL = "Recorded runs"
COMMITTED = typer.Option("--committed", help="Only the runs that git tracks.")
VERIFY = typer.Option("--verify", help="Only check whether they are up to date.")


@command("report", panel=PANEL, behind="run")
def rebuild(run: Path | None = None, committed: Annotated[bool, COMMITTED] = False) -> None:
    """Compute summaries and reports again from the files of finished trials, and pack the runs.

    A run that repeats another recorded run is also compared with it again, and the repetitions that
    are filed with a run are judged again. What git tracks stays as it is: a RUN that it tracks is
    computed in a copy below exports/. With `--committed` those alone are computed in place: one
    that lies here without a report gets none, and the pages that are generated from all runs are
    written last.
    """
    if committed:
        require_clone("report --committed")
    folders = _folders(run, committed)
    if run:
        _rebuild(_copied(folders[0]) if is_tracked(folders[0]) else folders[0])
        return
    if not folders:
        console.print(f"There is no run in {shown_path(RESULTS)} yet: `make labs` lists the labs.")
    if not committed and (kept := tracked_runs()):
        folders = [folder for folder in folders if folder.path not in kept]
        console.print(
            f"Left as is, because git tracks it: {counted(len(kept), 'run')}. RUN= tells one in a"
            " copy, `labs report --committed` computes all in place.",
            soft_wrap=True,
        )
    left_out = 0
    for folder in folders:
        try:
            told = not committed or (folder.path / "report.md").exists()
            _rebuild(folder, told, committed)
        except LabError as error:
            left_out += 1
            _say_left_out(folder.place, str(error))
    if left_out:
        raise LabError(f"runs whose report was not computed: {left_out} of {len(folders)}")
    if committed and folders:
        readme()


def _copied(folder: RunFolder) -> RunFolder:
    """Copy a run to where git ignores it, as deep as it lies, and say so."""
    with readable(folder):
        folder.run()  # has no files but its own
    copy = RunFolder(ROOT / "exports" / folder.place)
    shutil.rmtree(copy.path, ignore_errors=True)
    shutil.copytree(folder.path, copy.path)
    console.print(
        f"Git tracks this run: its report is computed in a copy, {shown_path(copy.path)};"
        " `labs report --committed` computes all that it tracks in place.",
        soft_wrap=True,
    )
    return copy


@command("words", panel=PANEL)
def tell_again(
    lab: str,
    out: Path = ROOT / "site",
) -> None:
    """Tell a lab's newest runs again after its page.md was edited, and show what changed.

    Figures are those on file; nothing is computed from the records.
    """
    require_known("LAB", lab, tuple(LABS))
    runs = [folder for folder in newest_runs() if folder.lab_name == lab]
    for folder in runs:
        path = folder.path / "report.md"
        before = path.read_text().splitlines() if path.exists() else []
        report.write(folder, report.draw(folder, save=False))
        for line in unified_diff(before, path.read_text().splitlines(), n=0, lineterm=""):
            console.print(escape(line), soft_wrap=True)
        show_path(path)
    if not runs:
        console.print(f"No run of {lab} is on file: `make lab-{lab}` makes one.")
    show_path(write_lesson(out, runs, lab))


def _folders(run: Path | None, committed: bool = False) -> list[RunFolder]:
    """Return the run named, every run that git tracks, or every recorded run."""
    if run and committed:
        raise LabError("RUN names one run, and `--committed` all that git tracks: give one of them")
    return [open_run(run)] if run else committed_runs() if committed else all_runs()


def _rebuild(folder: RunFolder, told: bool = True, committed: bool = False) -> None:
    with readable(folder):
        summarise(folder)
        if told:
            figures = report.draw(folder)
            for path in (report.write(folder, figures), pages.write(folder, figures)):
                show_path(path)
        original = reproduction.original_of(folder)
        if original and folder.complete:
            result = reproduction.compare_with_original(original, folder)
            if committed or not reproduction.is_published(result, original):
                show_path(reproduction.file_with_original(result, original))
        for path in reproduction.judge_again(folder):
            show_path(path)
        packing.pack(folder)


def _say_left_out(name: str, why: str) -> None:
    console.print(f"Left out: {escape(name)} cannot be read: {escape(why)}", soft_wrap=True)


@command("site", panel=PANEL)
def site(out: Path = ROOT / "site") -> None:
    """Write the course and a page for every run, to open in a browser or to publish."""
    index, left_out = write_site(out)
    for name, why in left_out.items():
        _say_left_out(name, why)
    show_path(index)


@command("score", panel=PANEL, behind="run")
def rescore(run: Path, theirs: Path | None = None) -> None:
    """Show what other tools would have reported for a run's records, and why they differ.

    `THEIRS=` puts the figures beside it that one of them saved.
    """
    show(scored(open_run(run), figures=benchmarks.theirs(theirs) if theirs else ()))


def scored(
    folder: RunFolder, tool: str = "", figures: Sequence[Sequence[float | None]] = ()
) -> Markdown:
    """Tell a run by every tool's definitions, or by one tool's, beside its own figures.

    These are given load by load. Raises LabError where they are of other loads.
    """
    with readable(folder):
        lab, points = folder.run().rebuilt_lab(), folder.run().points()
        by_point = score.scores(folder)
    if figures and len(figures) != len(by_point):
        raise LabError(f"THEIRS has {len(figures)} loads, and the run {len(by_point)}")
    tools = (score.THIS_LAB.name, tool) if tool else (*next(iter(by_point.values()), {}),)
    shown: dict[str, dict[str, Sequence[float | None]]] = {
        key: {name: of[name] for name in tools} for key, of in by_point.items()
    }
    for key, row in zip(shown, figures, strict=False):
        shown[key][score.THEIRS] = row
    lines = bullets(score.explanations(points, tools))
    return section("One run, every definition", table_of(score.table(shown, lab)), lines)


@command("check", "check-results", PANEL, behind="run")
def check(
    run: Path | None = None,
    committed: Annotated[bool, COMMITTED] = False,
) -> None:
    """Check that recorded runs are readable, complete and in the folder of their machine."""
    count = 0
    for folder in (folders := _folders(run, committed)):
        for problem in (*all_problems(folder), *reproduction.problems(folder)):
            count += 1
            text = f"{shown_path(folder.path)}: {escape(problem)}"
            console.print(text, soft_wrap=True)
    if count:
        raise LabError(f"{count} problems were found: repair or remove these runs")
    console.print(f"Well-formed runs: {len(folders)}.")


@command("readme", panel=PANEL)
def readme(verify: Annotated[bool, VERIFY] = False) -> None:
    """Write the generated parts of README.md, the pages in results/ and the dashboards again."""
    require_clone("readme")
    if verify and (stale := leaderboards.stale()):
        names = "; ".join(
            os.path.relpath(path) + f" ({why})" * bool(why) for path, why in stale.items()
        )
        raise LabError(f"generated parts are out of date in {names}: run `make readme`")
    if verify:
        return
    variants = [[v.name for v in lab.variants] for lab in LABS.values()]
    for path in (*leaderboards.write(), *boards.write(variants, METRICS)):
        show_path(path)
    for folder in leaderboards.uncounted():
        name = shown_path(folder.path)
        console.print(
            f"Not counted, because git does not track it: {name}. `git add` it to count it.",
            soft_wrap=True,
        )


@command("compare", panel=PANEL)
def compare_two(
    a: str,
    b: str,
    force: bool = False,
    out: Path | None = None,
    fail_if: str = "",
    thresholds: Path = worse.DEFAULT,
) -> None:
    """Compare two runs, variants or machines: what differs, and by how much."""
    if fail_if:
        require_known("FAIL_IF", fail_if, ("worse",))
    elif thresholds != worse.DEFAULT:
        raise LabError("THRESHOLDS= changes nothing without FAIL_IF=worse")
    limits = worse.thresholds(thresholds)
    if out and out.suffix not in (".md", ".json"):
        raise LabError(f"OUT={out}: a comparison is written as Markdown (x.md) or JSON (x.json)")
    comparisons, refused = compare.compare_named(a, b, force)
    if out:
        write = side_by_side.write_json if out.suffix == ".json" else side_by_side.write
        write(comparisons, refused, out)
    show(side_by_side.document(comparisons, refused))
    if out:
        console.print(f"Written: [bold]{escape(str(out))}[/]")
    if not fail_if:
        return
    worsened = [f"{of.lab}: {line}" for of in comparisons for line in worse.failures(of, limits)]
    if failed := [*refused, *worsened]:
        show(bullets(f"FAILED {line}" for line in failed))
        if worsened and not any(of.differences for of in comparisons):  # else a headline names it
            show(bullets([f"Likeliest cause: {manifest.likeliest_cause([])}"]))
        raise typer.Exit(1)
    console.print("Passed: no verdict flipped, and no figure is worse by more than its limit.")


@command("export", panel=PANEL)
def export_run(
    run: Path,
    out: Path | None = None,
) -> None:
    """Write a run as CSV tables."""
    folder = open_run(run)
    with readable(folder):
        written = export.export(folder, out or ROOT / "exports" / folder.path.name)
    console.print(f"{len(written)} files in [bold]{shown_path(written[0].parent)}[/]:")
    console.print(escape(", ".join(path.name for path in written)), style="dim")
