"""The commands about runs on file: report, compare, gate, export and the like."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from labs.commands.terminal import console, folders_of, plainly, show
from labs.comparing import compare, gate, leaderboards, page, reproduction, side_by_side
from labs.filing import export, manifest, score
from labs.filing.committed import committed_runs
from labs.filing.export import Format as ExportFormat
from labs.filing.results import RESULTS, open_run, problems
from labs.lab import LabError
from labs.telling import pages, report
from labs.telling.document import bullets, section, table_of
from labs.telling.summary import summarise
from serving.models import ROOT

app = typer.Typer()
TWO = "A run's folder, one with `:variant` behind it, or a machine's folder of results."
ForceOption = Annotated[
    bool,
    typer.Option("--force", envvar="LABS_FORCE", help="Compare all the same; every table says so."),
]


@app.command("report")
def rebuild(
    run: Annotated[
        Path | None, typer.Argument(envvar="LABS_RUN", help="A run's folder; default: every run.")
    ] = None,
) -> None:
    """Compute summaries and reports again from the files of finished trials.

    Where the run repeats another that is on file: the answer, too.
    """
    with plainly():
        for folder in (folders := folders_of(run)):
            summarise(folder)
            for path in (report.write(folder), pages.write(folder)):
                console.print(os.path.relpath(path), soft_wrap=True)
            if original := reproduction.original_of(folder):
                path = reproduction.file(reproduction.answer(original, folder), original)
                console.print(os.path.relpath(path), soft_wrap=True)
        if not folders:
            console.print(
                f"No run under {os.path.relpath(RESULTS)} yet: `make labs` lists the labs"
            )


@app.command()
def site(
    out: Annotated[
        Path, typer.Option(envvar="LABS_OUT", file_okay=False, help="The folder to write into.")
    ] = ROOT / "site",
) -> None:
    """Write a page of every run and an index, to be opened or published as they are."""
    with plainly():
        index, left_out = pages.write_site(out)
        for name, why in left_out.items():
            console.print(f"Left out: {name} cannot be read: {escape(why)}", soft_wrap=True)
        console.print(os.path.relpath(index), soft_wrap=True)


@app.command("score")
def rescore(
    run: Annotated[Path, typer.Argument(envvar="LABS_RUN", help="A run's folder.")],
) -> None:
    """What other tools would have reported of a run's own records, and why they differ."""
    with plainly():
        (folder,) = folders_of(run)
        lab, points = folder.run().rebuilt_lab(), folder.run().points()
        table = table_of(score.table(score.scores(folder), lab))
        show(section("One trace, every definition", table, bullets(score.explanations(points))))


@app.command()
def check(
    run: Annotated[
        Path | None, typer.Argument(envvar="LABS_RUN", help="Default: every run.")
    ] = None,
    committed: Annotated[
        bool, typer.Option("--committed", help="Check the runs that git knows, no others.")
    ] = False,
) -> None:
    """Validate results on file: readable, complete, under the right machine."""
    with plainly():
        wrong = 0
        for folder in (folders := committed_runs() if committed else folders_of(run)):
            for problem in [*problems(folder), *reproduction.problems(folder)]:
                wrong += 1
                text = f"{os.path.relpath(folder.path)}: {escape(problem)}"
                console.print(text, soft_wrap=True)
        if wrong:
            raise LabError(f"{wrong} problems: mend or remove these runs")
        console.print(f"Well-formed runs: {len(folders)}.")


@app.command()
def readme(
    verify: Annotated[bool, typer.Option("--verify", help="Only say whether it is stale.")] = False,
) -> None:
    """Write the generated tables anew: README.md's, and each machine's page."""
    with plainly():
        if verify and (stale := leaderboards.stale()):
            names = "; ".join(
                os.path.relpath(path) + f" ({why})" * bool(why) for path, why in stale.items()
            )
            raise LabError(f"generated tables are stale in {names}: run `make readme`")
        if verify:
            return
        for path in leaderboards.write():
            console.print(os.path.relpath(path), soft_wrap=True)
        for folder in leaderboards.uncounted():
            name = os.path.relpath(folder.path)
            console.print(f"Not counted: git does not know {name}: git add it", soft_wrap=True)


@app.command("compare")
def compare_two(
    a: Annotated[str, typer.Option("-a", envvar="LABS_A", help=TWO)],
    b: Annotated[str, typer.Option("-b", envvar="LABS_B", help="The other; ratios are B / A.")],
    force: ForceOption = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            envvar="LABS_OUT",
            help="Also write it: as a page (x.html), or Markdown and plots.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", envvar="LABS_JSON", help="Print JSON instead of tables.")
    ] = False,
) -> None:
    """Two runs, variants or machines side by side: what differs, and by how much."""
    with plainly():
        found, refused = compare.pairs(a, b, force)
        if out:
            write = page.write if out.suffix == ".html" else side_by_side.write
            write(found, refused, out)
        if as_json:
            print(side_by_side.plain(found, refused))
            return
        show(side_by_side.document(found, refused))
        if out:
            console.print(f"Written: [bold]{out}[/]")


@app.command("manifest-diff")
def manifest_diff(
    a: Annotated[Path, typer.Option("-a", envvar="LABS_A", help="A run's folder.")],
    b: Annotated[Path, typer.Option("-b", envvar="LABS_B", help="Another run's.")],
) -> None:
    """What differs in how two runs were made, the likeliest cause of other figures first."""
    with plainly():
        runs = [open_run(path) for path in (a, b)]
        said = [manifest.facts(f.run(), manifest.cpu_taken_by_others(f)) for f in runs]
        rows = manifest.table(manifest.differences(*said), ("A", "B"))
        if len(rows) > 1:
            show(section("What differs", table_of(rows)))
        else:
            console.print("Nothing recorded differs.")
        if missing := manifest.unrecorded(*said):
            console.print(f"Recorded in one of them only: {', '.join(missing)}.")


@app.command("gate")
def pass_gate(
    run: Annotated[str, typer.Option("--run", envvar="LABS_RUN", help="The run to let pass.")],
    baseline: Annotated[str, typer.Option(envvar="LABS_BASELINE", help="What it is held against.")],
    limits: Annotated[
        Path, typer.Option("--thresholds", envvar="LABS_THRESHOLDS", help="TOML; see the default.")
    ] = gate.DEFAULT,
    force: ForceOption = False,
) -> None:
    """Fail where a run is worse than its baseline: a verdict flipped, a figure past its margin."""
    with plainly():
        allowed = gate.thresholds(limits)
        found = compare.compare(compare.side(baseline), compare.side(run), force)
        show(side_by_side.headline(found))
        if failed := gate.failures(found, allowed):
            show(bullets(f"FAILED {line}" for line in failed))
            if not found.differences:  # those were told above
                show(bullets([f"Likeliest cause: {manifest.likeliest_cause([])}"]))
            raise typer.Exit(1)
        console.print("Passed: no verdict flipped, no figure is worse past its margin.")


@app.command("export")
def export_run(
    run: Annotated[Path, typer.Option("--run", envvar="LABS_RUN", help="A run's folder.")],
    kind: Annotated[
        ExportFormat, typer.Option("--as", envvar="LABS_AS", help="csv, parquet, or vllm.")
    ] = "csv",
    out: Annotated[
        Path | None, typer.Option("--out", envvar="LABS_OUT", help="Default: exports/<run>.")
    ] = None,
) -> None:
    """A run as CSV or Parquet tables, or as result files of vllm bench serve."""
    with plainly():
        folder = open_run(run)
        written = export.export(folder, kind, out or ROOT / "exports" / folder.path.name)
        console.print(f"{len(written)} files in [bold]{os.path.relpath(written[0].parent)}[/]:")
        console.print(", ".join(path.name for path in written), style="dim")


@app.command()
def leaderboard() -> None:
    """Every lab on every machine: effect, interval and verdict of its claims."""
    with plainly():
        show(section("Leaderboard", leaderboards.leaderboard()))
