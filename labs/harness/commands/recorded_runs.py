"""The commands about recorded runs: report, compare, gate, export and the like."""

from __future__ import annotations

import os
from difflib import unified_diff
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from labs import LABS
from labs.harness.commands.options import require_known
from labs.harness.commands.terminal import console, reported_errors, show, show_path, shown_path
from labs.harness.comparing import compare, gate, leaderboards, page, reproduction, side_by_side
from labs.harness.filing import export, manifest, packing, score
from labs.harness.filing.checks import unreadable
from labs.harness.filing.committed import committed_runs
from labs.harness.filing.export import Format as ExportFormat
from labs.harness.filing.newest import newest_runs
from labs.harness.filing.results import RESULTS, RunFolder, all_runs, open_run, readable
from labs.harness.spec import LabError
from labs.harness.telling import pages, report
from labs.harness.telling.document import bullets, section, table_of
from labs.harness.telling.site import write_lesson, write_site
from labs.harness.telling.summary import all_problems, summarise
from serving.weights.models import ROOT

app = typer.Typer()
TWO = "The folder of a run, optionally with `:variant` behind it, or a machine's folder of results."
ForceOption = Annotated[
    bool,
    typer.Option(
        "--force",
        envvar="LABS_FORCE",
        help="Compare runs that are not comparable; every table then says so.",
    ),
]


@app.command("report")
def rebuild(
    run: Annotated[
        Path | None,
        typer.Argument(envvar="LABS_RUN", help="The folder of a run; default: every run."),
    ] = None,
) -> None:
    """Compute summaries and reports again from the files of finished trials, and pack the runs.

    A run that repeats another recorded run is also compared with it again, and the repetitions that
    are filed with a run are judged again.
    """
    with reported_errors():
        if run:
            _rebuild(open_run(run))
            return
        left_out = 0
        for folder in (folders := all_runs()):
            try:
                _rebuild(folder)
            except LabError as error:
                left_out += 1
                _say_left_out(folder.place, str(error))
        if left_out:
            raise LabError(f"runs whose report was not computed: {left_out} of {len(folders)}")
        if not folders:
            console.print(
                f"There is no run in {shown_path(RESULTS)} yet: `make labs` lists the labs."
            )


@app.command("words")
def tell_again(
    name: Annotated[str, typer.Option("--lab", envvar="LABS_LAB", help="The lab.")],
    out: Annotated[
        Path, typer.Option(envvar="LABS_OUT", file_okay=False, help="Where the lesson is written.")
    ] = ROOT / "site",
) -> None:
    """Tell a lab's newest runs again after its page.md was edited, and show what changed.

    Figures are those on file; nothing is computed from the records.
    """
    with reported_errors():
        require_known("LAB", name, tuple(LABS))
        runs = [folder for folder in newest_runs() if folder.lab_name == name]
        for folder in runs:
            path = folder.path / "report.md"
            before = path.read_text().splitlines()
            report.write(folder, report.draw(folder, save=False))
            for line in unified_diff(before, path.read_text().splitlines(), n=0, lineterm=""):
                console.print(escape(line), soft_wrap=True)
            show_path(path)
        if not runs:
            console.print(f"No run of {name} is on file: `make lab-{name}` makes one.")
        show_path(write_lesson(out, runs, name))


def _folders(run: Path | None) -> list[RunFolder]:
    """Return the run named, or every recorded run."""
    return [open_run(run)] if run else all_runs()


def _rebuild(folder: RunFolder) -> None:
    with readable(folder):
        summarise(folder)
        figures = report.draw(folder)
        for path in (report.write(folder, figures), pages.write(folder, figures)):
            show_path(path)
        original = reproduction.original_of(folder)
        if original and folder.complete:
            result = reproduction.compare_with_original(original, folder)
            path = reproduction.file_with_original(result, original)
            show_path(path)
        for path in reproduction.judge_again(folder):
            show_path(path)
        packing.pack(folder)


def _say_left_out(name: str, why: str) -> None:
    console.print(f"Left out: {escape(name)} cannot be read: {escape(why)}", soft_wrap=True)


@app.command()
def site(
    out: Annotated[
        Path, typer.Option(envvar="LABS_OUT", file_okay=False, help="The folder to write into.")
    ] = ROOT / "site",
) -> None:
    """Write the course and a page for every run, to open in a browser or to publish."""
    with reported_errors():
        index, left_out = write_site(out)
        for name, why in left_out.items():
            _say_left_out(name, why)
        show_path(index)


@app.command("score")
def rescore(
    run: Annotated[Path, typer.Argument(envvar="LABS_RUN", help="The folder of a run.")],
) -> None:
    """Show what other tools would have reported for a run's records, and why they differ."""
    with reported_errors():
        folder = open_run(run)
        with readable(folder):
            lab, points = folder.run().rebuilt_lab(), folder.run().points()
            table = table_of(score.table(score.scores(folder), lab))
        show(section("One run, every definition", table, bullets(score.explanations(points))))


@app.command()
def check(
    run: Annotated[
        Path | None, typer.Argument(envvar="LABS_RUN", help="Default: every run.")
    ] = None,
    committed: Annotated[
        bool, typer.Option("--committed", help="Check only the runs that git tracks.")
    ] = False,
) -> None:
    """Check that recorded runs are readable, complete and in the folder of their machine."""
    with reported_errors():
        count = 0
        for folder in (folders := committed_runs() if committed else _folders(run)):
            for problem in (*all_problems(folder), *reproduction.problems(folder)):
                count += 1
                text = f"{shown_path(folder.path)}: {escape(problem)}"
                console.print(text, soft_wrap=True)
        if count:
            raise LabError(f"{count} problems were found: repair or remove these runs")
        console.print(f"Well-formed runs: {len(folders)}.")


@app.command()
def readme(
    verify: Annotated[
        bool, typer.Option("--verify", help="Only check whether they are up to date.")
    ] = False,
) -> None:
    """Write the generated parts of README.md and the pages in results/ again."""
    with reported_errors():
        if verify and (stale := leaderboards.stale()):
            names = "; ".join(
                os.path.relpath(path) + f" ({why})" * bool(why) for path, why in stale.items()
            )
            raise LabError(f"generated parts are out of date in {names}: run `make readme`")
        if verify:
            return
        for path in leaderboards.write():
            show_path(path)
        for folder in leaderboards.uncounted():
            name = shown_path(folder.path)
            console.print(
                f"Not counted, because git does not track it: {name}. `git add` it to count it.",
                soft_wrap=True,
            )


@app.command("compare")
def compare_two(
    a: Annotated[str, typer.Option("-a", envvar="LABS_A", help=TWO)],
    b: Annotated[str, typer.Option("-b", envvar="LABS_B", help="The other one; ratios are B / A.")],
    force: ForceOption = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            envvar="LABS_OUT",
            help="Also write a file: a page (x.html), or Markdown with plots (x.md).",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", envvar="LABS_JSON", help="Print JSON instead of tables.")
    ] = False,
) -> None:
    """Compare two runs, variants or machines: what differs, and by how much."""
    with reported_errors():
        comparisons, refused = compare.compare_named(a, b, force)
        if out:
            write = page.write if out.suffix == ".html" else side_by_side.write
            write(comparisons, refused, out)
        if as_json:
            print(side_by_side.as_json(comparisons, refused))
            return
        show(side_by_side.document(comparisons, refused))
        if out:
            console.print(f"Written: [bold]{escape(str(out))}[/]")


@app.command("manifest-diff")
def manifest_diff(
    a: Annotated[Path, typer.Option("-a", envvar="LABS_A", help="The folder of a run.")],
    b: Annotated[Path, typer.Option("-b", envvar="LABS_B", help="The folder of another run.")],
) -> None:
    """Show what differs in how two runs were made, the likeliest cause first."""
    with reported_errors():
        facts = []
        for folder in [open_run(path) for path in (a, b)]:
            with readable(folder):
                facts.append(manifest.recorded(folder))
        rows = manifest.table(manifest.differences(*facts), ("A", "B"))
        if len(rows) > 1:
            show(section("What differs", table_of(rows)))
        else:
            console.print("Nothing that was recorded differs.")
        if missing := manifest.unrecorded(*facts):
            console.print(f"Recorded in only one of them: {escape(', '.join(missing))}.")


@app.command("gate")
def pass_gate(
    run: Annotated[str, typer.Option("--run", envvar="LABS_RUN", help="The run to check.")],
    baseline: Annotated[
        str, typer.Option(envvar="LABS_BASELINE", help="The run to compare it with.")
    ],
    limits: Annotated[
        Path,
        typer.Option(
            "--thresholds",
            envvar="LABS_THRESHOLDS",
            help="A TOML file of limits; the default one explains them.",
        ),
    ] = gate.DEFAULT,
    force: ForceOption = False,
) -> None:
    """Fail if a run is worse than its baseline: a verdict flipped, or a figure past its limit."""
    with reported_errors():
        allowed = gate.thresholds(limits)
        comparison = compare.compare(compare.read_side(baseline), compare.read_side(run), force)
        show(side_by_side.headline(comparison))
        if failed := gate.failures(comparison, allowed):
            show(bullets(f"FAILED {line}" for line in failed))
            if not comparison.differences:  # else the headline has named it
                show(bullets([f"Likeliest cause: {manifest.likeliest_cause([])}"]))
            raise typer.Exit(1)
        console.print("Passed: no verdict flipped, and no figure is worse by more than its limit.")


@app.command("export")
def export_run(
    run: Annotated[Path, typer.Option("--run", envvar="LABS_RUN", help="The folder of a run.")],
    kind: Annotated[
        ExportFormat,
        typer.Option("--as", envvar="LABS_AS", help="The format: csv, parquet or vllm."),
    ] = "csv",
    out: Annotated[
        Path | None, typer.Option("--out", envvar="LABS_OUT", help="Default: exports/<run>.")
    ] = None,
) -> None:
    """Write a run as CSV or Parquet tables, or as the result files of vllm bench serve."""
    with reported_errors():
        folder = open_run(run)
        with readable(folder):
            written = export.export(folder, kind, out or ROOT / "exports" / folder.path.name)
        console.print(f"{len(written)} files in [bold]{shown_path(written[0].parent)}[/]:")
        console.print(escape(", ".join(path.name for path in written)), style="dim")


@app.command()
def leaderboard() -> None:
    """Show every lab on every machine: effect, interval and verdict of its claims."""
    with reported_errors():
        for folder in all_runs():
            if why := unreadable(folder):
                _say_left_out(folder.place, why)
        show(section("Leaderboard", leaderboards.leaderboard()))
