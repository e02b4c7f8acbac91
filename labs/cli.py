"""The command line: `labs --help`. The Makefile's targets set up first, then call it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dashboards import boards, live, prometheus, stack
from dashboards.prometheus import PrometheusError
from dashboards.stack import Stack, StackError
from labs import (
    LABS,
    backfill,
    compare,
    derived,
    doctor,
    export,
    gate,
    html,
    manifest,
    pages,
    report,
    reproduce,
    score,
    side_by_side,
    sitting,
)
from labs.export import Format as ExportFormat
from labs.lab import Lab, LabError, parse_changes
from labs.questions import QUESTIONS
from labs.results import RESULTS, RunFolder, all_runs, open_run, problems
from labs.run import (
    Request,
    alone,
    is_dummy,
    model_of,
    require_devices,
    start_locust_ui,
    summarise,
)
from labs.run import run as run_lab
from loadtests.generator import GeneratorError
from serving import bundle, engine, machine, models
from serving.bundle import BundleError
from serving.engine import EngineError
from serving.models import ROOT, ModelError

app = typer.Typer(
    help="Ask a question about LLM inference serving; answer it by measuring this machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
PORT, WEB_PORT, WATCH_PORT, GRAFANA_PORT = 8000, 8089, 9090, 3000
EXPECTED = (
    LabError,
    ModelError,
    EngineError,
    GeneratorError,
    PrometheusError,
    BundleError,
    StackError,
)  # each a sentence for the reader

LabName = Annotated[str, typer.Argument(help="A lab's name; `labs list` names them all.")]
SetOption = Annotated[
    str,
    typer.Option(
        "--set",
        envvar="SET",
        help="Change existing fields for this run: 'window_s=4 repeats=5"
        " workloads.exponential.output_tokens.mean_tokens=48'. The run is marked ad hoc.",
    ),
]
QuickOption = Annotated[
    bool, typer.Option(envvar="QUICK", help="Short windows, one repeat or two: a smoke test.")
]
TWO = "A run's folder, one with `:variant` behind it, or a machine's folder of results."
ForceOption = Annotated[
    bool,
    typer.Option("--force", envvar="FORCE", help="Compare all the same; every table says so."),
]
EngineOption = Annotated[
    str,
    typer.Option(
        envvar="ENGINE_COMMAND",
        help="What starts the engine, its flags follow: to wrap vLLM in a profiler, say.",
    ),
]
ModelOption = Annotated[
    str, typer.Option("--model", envvar="MODEL", help="A model folder or a Hugging Face id.")
]
WeightsOption = Annotated[
    str,
    typer.Option(
        "--weights",
        envvar="WEIGHTS",
        help="`dummy` serves random weights in an architecture that ships with the lab (MODEL="
        " names it): speed is real, text is not.",
    ),
]
TpOption = Annotated[
    int, typer.Option("--tp", envvar="TP", min=1, help="GPUs that share each layer (tensors).")
]
DpOption = Annotated[
    int, typer.Option("--dp", envvar="DP", min=1, help="Copies of the model, each on its GPUs.")
]
PpOption = Annotated[
    int, typer.Option("--pp", envvar="PP", min=1, help="GPUs that share the layers (pipeline).")
]
SeedOption = Annotated[
    str, typer.Option("--seed", envvar="SEED", help="Another draw of lengths, prompts and order.")
]


@app.command()
def run(
    lab: LabName,
    quick: QuickOption = False,
    aa: Annotated[
        bool,
        typer.Option(
            "--aa",
            envvar="AA",
            help="Run the lab's baseline against itself: what is found then is noise.",
        ),
    ] = False,
    changes: SetOption = "",
    model: ModelOption = "",
    weights: WeightsOption = "",
    tp: TpOption = 1,
    dp: DpOption = 1,
    pp: PpOption = 1,
    endpoint: Annotated[
        str,
        typer.Option(
            envvar="ENDPOINT",
            help="Drive this running OpenAI-compatible server, for a lab with one variant.",
        ),
    ] = "",
    seed: SeedOption = "",
    resume: Annotated[
        bool,
        typer.Option(envvar="RESUME", help="Go on with the newest unfinished run of this lab."),
    ] = False,
    engine_command: EngineOption = "",
) -> None:
    """Run a lab: predict, measure, judge, report."""
    with _plainly():
        request = Request(
            lab=_lab(lab),
            quick=quick,
            aa=aa,
            changes={**_parallel(tp, dp, pp), **_changes(changes, seed)},
            model=model,
            weights=weights,
            endpoint=endpoint,
            resume=resume,
            engine_command=shlex.split(engine_command) or engine.SERVER,
        )
        if not _play(request).complete:
            console.print("Try the rest again with RESUME=1.")
            raise typer.Exit(1)


@app.command("all")
def run_all(
    quick: QuickOption = False,
    model: ModelOption = "",
    weights: WeightsOption = "",
    tp: TpOption = 1,
    dp: DpOption = 1,
    pp: PpOption = 1,
    fresh: Annotated[
        bool, typer.Option(envvar="FRESH", help="Forget what an unfinished sitting has done.")
    ] = False,
) -> None:
    """Run every lab in order, go on where an earlier call stopped, and end in one page."""
    with _plainly():
        parallel = _parallel(tp, dp, pp)
        state = sitting.start(quick, model, fresh, weights, parallel)
        left: dict[str, str] = {}
        for place, (name, lab) in enumerate(LABS.items(), 1):
            console.print(f"\n[bold]Lab {place} of {len(LABS)}: {lab.title}[/]")
            if name in state.done:
                console.print(f"Done in this sitting: {state.done[name]}")
                continue
            request = Request(
                lab, quick=quick, changes=dict(parallel), model=model, weights=weights,
                resume=state.begin(name),
            )  # fmt: skip
            try:
                folder = _play(request)
            except EXPECTED as error:
                left[name] = str(error)
                errors.print(f"[bold red]error:[/] {escape(str(error))}")
                continue
            if folder.complete:
                state.finish(name, folder.path)
            else:
                left[name] = "some of its trials failed"
        if page := state.page():
            console.print(f"\nEvery lab on one page: [bold]{os.path.relpath(page)}[/]")
        for name, why in left.items():
            console.print(f"Not finished: {name}: {escape(why)}")
        if left:
            console.print("`make labs-all` again runs only these.")
            raise typer.Exit(1)
        state.end()


@app.command()
def make(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(derived.RECIPES)}.")],
    model: ModelOption = "",
    weights: WeightsOption = "",
    again: Annotated[
        bool, typer.Option(envvar="AGAIN", help="Make it anew where it is there already.")
    ] = False,
) -> None:
    """Make a model that labs derive from the served one; a lab makes what it needs by itself."""
    with _plainly():
        served = model_of(machine.detect(), model, weights)
        if again and (place := derived.place(served, name)).is_relative_to(models.CACHE):
            shutil.rmtree(place, ignore_errors=True)
        folder = derived.make(served, name, lambda line: console.print(escape(line)))
        for key, value in derived.about(folder).items():
            console.print(f"  {key}: {escape(str(value))}", style="dim")
        console.print(f"There: [bold]{os.path.relpath(folder)}[/]")


@app.command("list")
def list_labs() -> None:
    """List the labs and the questions each answers."""
    table = Table("Lab", "Question", "Answers", title="Labs", title_justify="left")
    for lab in LABS.values():
        answers = "\n".join(f"{i}  {QUESTIONS[i]}" for i in lab.answers)
        table.add_row(f"make lab-{lab.name}", lab.question, answers)
    console.print(table)


@app.command()
def serve(
    lab: Annotated[str, typer.Option(envvar="LAB", help="Whose engine settings.")],
    variant: Annotated[str, typer.Option(envvar="VARIANT", help="Default: the first.")] = "",
    port: Annotated[int, typer.Option(envvar="PORT", min=1, max=65535)] = PORT,
    changes: SetOption = "",
    model: ModelOption = "",
    weights: WeightsOption = "",
    tp: TpOption = 1,
    dp: DpOption = 1,
    pp: PpOption = 1,
) -> None:
    """Start a variant's engine in the foreground; Ctrl-C ends it."""
    with _plainly():
        host = machine.detect()
        asked = {**_parallel(tp, dp, pp), **_changes(changes)}
        resolved = _lab(lab).at(models.scale_of(host), False, asked, is_dummy(weights))
        require_devices(resolved, host)
        by_name = {v.name: v for v in resolved.variants}
        if variant and variant not in by_name:
            raise LabError(f"{lab} has no variant {variant!r}; it has {', '.join(by_name)}")
        flags = resolved.flags_of(by_name[variant] if variant else resolved.variants[0])
        served = model_of(host, model, weights)
        engine.require_port(port, "PORT")
        engine.check_flags([flags])
        argv = [*engine.SERVER, *engine.serve_argv(served, flags, port)]
        console.print(f"Serving {served.name} at http://127.0.0.1:{port} (ready in about 35 s):")
        console.print("python " + escape(" ".join(argv[1:])), style="dim")
        os.execve(argv[0], argv, {**os.environ, **engine.serve_env(host.kind, served)})


@app.command()
def locust(
    lab: Annotated[str, typer.Option(envvar="LAB", help="Whose workload.")],
    workload: Annotated[str, typer.Option(envvar="WORKLOAD", help="Default: the first.")] = "",
    endpoint: Annotated[
        str, typer.Option(envvar="ENDPOINT", help="The server to drive; `make serve` starts one.")
    ] = f"http://127.0.0.1:{PORT}",
    web_port: Annotated[int, typer.Option(envvar="WEB_PORT", min=1, max=65535)] = WEB_PORT,
    changes: SetOption = "",
    model: ModelOption = "",
    weights: WeightsOption = "",
) -> None:
    """Open Locust's own web UI on a lab's workload, for turning knobs by hand."""
    with _plainly():
        engine.require_port(web_port, "WEB_PORT")
        with start_locust_ui(
            _lab(lab), _changes(changes), workload, endpoint, model, weights, web_port
        ) as process:
            console.print(
                f"Locust: http://127.0.0.1:{web_port} drives {endpoint}; choose the number of users"
                " there. Ctrl-C ends it."
            )
            while process.returncode is None:
                time.sleep(0.5)
            raise LabError(f"Locust ended; its last lines:\n{process.tail()}")


@app.command("report")
def rebuild(
    run: Annotated[
        Path | None, typer.Argument(envvar="RUN", help="A run's folder; default: every run.")
    ] = None,
) -> None:
    """Compute summaries and reports again from the files of finished trials."""
    with _plainly():
        for folder in (folders := _folders(run)):
            summarise(folder)
            for path in (report.write(folder), html.write(folder)):
                console.print(os.path.relpath(path), soft_wrap=True)
        if not folders:
            console.print(
                f"No run under {os.path.relpath(RESULTS)} yet: `make labs` lists the labs"
            )


@app.command()
def site(
    out: Annotated[
        Path, typer.Option(envvar="OUT", file_okay=False, help="The folder to write into.")
    ] = ROOT / "site",
) -> None:
    """Write a page of every run and an index, to be opened or published as they are."""
    with _plainly():
        index, left_out = html.write_site(out)
        for name, why in left_out.items():
            console.print(f"Left out: {name} cannot be read: {escape(why)}", soft_wrap=True)
        console.print(os.path.relpath(index), soft_wrap=True)


@app.command("score")
def rescore(
    run: Annotated[Path, typer.Argument(envvar="RUN", help="A run's folder.")],
) -> None:
    """What other tools would have reported of a run's own records, and why they differ."""
    with _plainly():
        (folder,) = _folders(run)
        lab, points = folder.run().rebuilt_lab(), folder.run().points()
        show("One trace, every definition", score.table(score.scores(folder), lab))
        for line in score.explained(points):
            console.print("  " + escape(line))


@app.command()
def check(
    run: Annotated[Path | None, typer.Argument(envvar="RUN", help="Default: every run.")] = None,
) -> None:
    """Validate results on file: readable, complete, under the right machine."""
    with _plainly():
        wrong = 0
        for folder in (folders := _folders(run)):
            for problem in problems(folder):
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
    with _plainly():
        if verify and (stale := pages.stale()):
            names = ", ".join(os.path.relpath(path) for path in stale)
            raise LabError(f"generated tables are stale in {names}: run `make readme`")
        for path in pages.write():
            console.print(os.path.relpath(path), soft_wrap=True)


@app.command()
def watch(
    port: Annotated[int, typer.Option(envvar="PORT", min=1, max=65535)] = WATCH_PORT,
) -> None:
    """Start a Prometheus that stays up between labs, with a page that draws what it sees."""
    with _plainly():
        found = prometheus.watching()
        if found is None:
            engine.require_port(port, "PORT")
            found = live.start(port)
        console.print(f"Watching: [bold]{found.url}/user/[/] (expressions: {found.url}/graph)")
        console.print("Labs record there from now on; `make watch-stop` ends it.")


@app.command("watch-stop")
def watch_stop() -> None:
    """End the Prometheus that `watch` started; its data stay."""
    with _plainly():
        console.print("Stopped." if prometheus.unwatch() else "None was up.")


@app.command("import")
def import_runs(
    run: Annotated[
        Path | None, typer.Argument(envvar="RUN", help="A run's folder; default: every run.")
    ] = None,
) -> None:
    """Load finished runs into Prometheus at their own times; what is there already stays."""
    with _plainly(), alone():
        folders = _folders(run)
        backfill.load(
            folders,
            lambda folder, came_of_it: console.print(
                f"{os.path.relpath(folder.path)}: {escape(came_of_it)}", soft_wrap=True
            ),
        )
        if folders and prometheus.watching() is None:
            console.print("`make watch` shows them.")


@app.command()
def dashboards() -> None:
    """Write the Grafana dashboards anew from their code."""
    with _plainly():
        for path in boards.write([[v.name for v in lab.variants] for lab in LABS.values()]):
            console.print(os.path.relpath(path), soft_wrap=True)


@app.command("compare")
def compare_two(
    a: Annotated[str, typer.Option("-a", envvar="A", help=TWO)],
    b: Annotated[str, typer.Option("-b", envvar="B", help="The other; ratios are B / A.")],
    force: ForceOption = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", envvar="OUT", help="Also write Markdown and plots here."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", envvar="JSON", help="Print JSON instead of tables.")
    ] = False,
) -> None:
    """Two runs, variants or machines side by side: what differs, and by how much."""
    with _plainly():
        found, refused = compare.pairs(a, b, force)
        if out:
            side_by_side.write(found, refused, out)
        if as_json:
            print(side_by_side.plain(found, refused))
            return
        for comparison in found:
            console.print(f"[bold]{comparison.lab}[/]")
            _say(side_by_side.headline(comparison))
            for title, rows in side_by_side.tables(comparison):
                show(title, rows)
        _say(f"Not compared: {line}" for line in refused)
        if out:
            console.print(f"Written: [bold]{out}[/]")


@app.command("manifest-diff")
def manifest_diff(
    a: Annotated[Path, typer.Option("-a", envvar="A", help="A run's folder.")],
    b: Annotated[Path, typer.Option("-b", envvar="B", help="Another run's.")],
) -> None:
    """What differs in how two runs were made, the likeliest cause of other figures first."""
    with _plainly():
        runs = [open_run(path) for path in (a, b)]
        said = [manifest.facts(f.run(), manifest.load_from_others(f)) for f in runs]
        rows = manifest.table(manifest.differences(*said), ("A", "B"))
        if len(rows) > 1:
            show("What differs", rows)
        else:
            console.print("Nothing recorded differs.")
        if missing := manifest.unrecorded(*said):
            console.print(f"Recorded in one of them only: {', '.join(missing)}.")


@app.command("reproduce")
def reproduce_run(
    run: Annotated[Path, typer.Option("--run", envvar="RUN", help="The run to repeat.")],
    model: ModelOption = "",
    resume: Annotated[
        bool, typer.Option(envvar="RESUME", help="Go on with an unfinished reproduction.")
    ] = False,
    engine_command: EngineOption = "",
) -> None:
    """Run a run on file again, and say which of its figures and verdicts came out the same."""
    with _plainly():
        original = open_run(run)
        before = original.run()
        asked = reproduce.request(
            before, model, resume, shlex.split(engine_command) or engine.SERVER
        )
        if note := reproduce.stale_note(before):
            console.print(f"[bold yellow]{escape(note)}[/]")
        differ = manifest.table(reproduce.differs_here(before, asked), ("there", "here"))
        if len(differ) > 1:
            show("What differs here", differ)
        folder = _play(asked)
        if not folder.complete:
            raise LabError("some of its trials failed: try the rest again with RESUME=1")
        found = reproduce.answer(original, folder)
        console.print("\n[bold]Reproduced?[/]")
        _say(reproduce.lines(found))
        if found.apart:
            show("What was not reproduced", side_by_side.figure_rows(found.apart))
        page = folder.path / "reproduction.md"
        console.print(f"Every figure: [bold]{os.path.relpath(page)}[/]", soft_wrap=True)
        if not found.verdicts_agree:
            raise typer.Exit(1)


@app.command("gate")
def pass_gate(
    run: Annotated[str, typer.Option("--run", envvar="RUN", help="The run to let pass.")],
    baseline: Annotated[str, typer.Option(envvar="BASELINE", help="What it is held against.")],
    limits: Annotated[
        Path, typer.Option("--thresholds", envvar="THRESHOLDS", help="TOML; see the default.")
    ] = gate.DEFAULT,
    force: ForceOption = False,
) -> None:
    """Fail where a run is worse than its baseline: a verdict flipped, a figure past its margin."""
    with _plainly():
        allowed = gate.thresholds(limits)
        found = compare.compare(compare.side(baseline), compare.side(run), force)
        _say(side_by_side.headline(found))
        if failed := gate.failures(found, allowed):
            _say(f"FAILED {line}" for line in failed)
            _say([f"Likeliest cause: {manifest.likeliest_cause(found.differences)}"])
            raise typer.Exit(1)
        console.print("Passed: no verdict flipped, no figure is worse past its margin.")


@app.command("export")
def export_run(
    run: Annotated[Path, typer.Option("--run", envvar="RUN", help="A run's folder.")],
    kind: Annotated[
        ExportFormat, typer.Option("--as", envvar="AS", help="csv, parquet, or vllm.")
    ] = "csv",
    out: Annotated[
        Path | None, typer.Option("--out", envvar="OUT", help="Default: exports/<run>.")
    ] = None,
) -> None:
    """A run as CSV or Parquet tables, or as result files of vllm bench serve."""
    with _plainly():
        folder = open_run(run)
        written = export.export(folder, kind, out or ROOT / "exports" / folder.path.name)
        console.print(f"{len(written)} files in [bold]{os.path.relpath(written[0].parent)}[/]:")
        console.print(", ".join(path.name for path in written), style="dim")


@app.command()
def leaderboard() -> None:
    """Every lab on every machine: effect, interval and verdict of its claims."""
    with _plainly():
        show("Leaderboard", pages.leaderboard())


@app.command("doctor")
def examine(model: ModelOption = "", weights: WeightsOption = "") -> None:
    """What this machine has and lacks, how to mend it, and which labs can run."""
    with _plainly():
        lines, abilities = doctor.examine(model, weights)
        found = Table("Part", "Found", "To mend it", title="This machine", title_justify="left")
        for line in lines:
            found.add_row(line.part, escape(line.found), f"[bold red]{escape(line.mend)}[/]")
        console.print(found)
        able = Table("Lab", "Runs here", "", title="Labs", title_justify="left")
        for a in abilities:
            able.add_row(a.lab, "yes" if a.able else "[bold red]no[/]", escape(a.note))
        console.print(able)
        if not all(a.able for a in abilities):
            raise typer.Exit(1)


@app.command("bundle")
def make_bundle(
    platform: Annotated[str, typer.Option("--for", envvar="FOR", help="cuda.")] = "cuda",
    python_version: Annotated[
        str, typer.Option(envvar="PYTHON_VERSION", help="Of the other machine's Python.")
    ] = "3.12",
    have: Annotated[
        Path | None,
        typer.Option(envvar="HAVE", help="A file with the other machine's `pip list`."),
    ] = None,
    without: Annotated[
        str,
        typer.Option(envvar="WITHOUT", help="Packages to leave out with all that only they need."),
    ] = "",
    vllm: Annotated[
        str, typer.Option(envvar="VLLM", help="Its version; default: what fits the torch there.")
    ] = "",
    part: Annotated[
        str, typer.Option(envvar="PART", help="Size of a part: bytes, or such as 60M, 2G.")
    ] = "1G",
    out: Annotated[Path, typer.Option(envvar="OUT", help="The folder for the parts.")] = Path(
        "bundle"
    ),
) -> None:
    """Gather all a GPU machine without internet needs, in parts with checksums."""
    with _plainly():
        bundle.check(platform, python_version)
        wanted = bundle.Wanted(
            python=python_version,
            have=bundle.read_have(have) if have else {},
            without=tuple(bundle.normal(name) for name in without.split()),
            vllm=vllm,
            part_bytes=bundle.part_size(part),
        )
        bundle.bundle(
            wanted,
            out.resolve(),
            models.CACHE / "bundle",
            bundle.prometheus_programs(),
            lambda line: console.print(escape(line), soft_wrap=True),
        )


@app.command("stack")
def start_stack(
    grafana_port: Annotated[
        int, typer.Option(envvar="GRAFANA_PORT", min=1, max=65535)
    ] = GRAFANA_PORT,
    prometheus_port: Annotated[
        int, typer.Option(envvar="PROMETHEUS_PORT", min=1, max=65535)
    ] = WATCH_PORT,
) -> None:
    """Start Prometheus and Grafana in containers, with the lab's dashboards in place."""
    with _plainly():
        found = Stack(grafana_port, prometheus_port, gpu=machine.detect().kind == "gpu")
        found.start()
        secret = "GRAFANA_PASSWORD"
        if secret not in os.environ:
            secret = f"in {os.path.relpath(stack.PASSWORD_FILE)}"
        console.print(f"Grafana: [bold]{found.url}[/] (user admin, password {secret})")
        console.print("Labs record there from now on; `make stack-stop` ends it.")


@app.command("stack-stop")
def stop_stack() -> None:
    """End the containers that `stack` started; the data stay."""
    with _plainly():
        Stack(GRAFANA_PORT, WATCH_PORT).stop()
        console.print("Stopped.")


@app.command("grafana-push")
def grafana_push(
    url: Annotated[
        str, typer.Option(envvar="GRAFANA_URL", help="The Grafana, such as http://host:3000.")
    ],
    prometheus_url: Annotated[
        str,
        typer.Option(envvar="PROMETHEUS_URL", help="The Prometheus, as that Grafana reaches it."),
    ] = f"http://127.0.0.1:{WATCH_PORT}",
) -> None:
    """Put the dashboards, their data source and the runs on file on a Grafana that is there.

    The token of a service account is read from GRAFANA_TOKEN.
    """
    from dashboards import push  # its client is not everywhere: a bundle leaves it out
    from labs.regions import regions

    with _plainly():
        found = regions(all_runs())
        try:
            push.push(url, os.environ.get("GRAFANA_TOKEN", ""), prometheus_url, found)
        except push.GrafanaError as error:
            raise LabError(str(error)) from error
        console.print(f"There: {len(boards.BOARDS)} dashboards and {len(found)} runs at {url}")


# --------------------------------------------------------------------------------- for all of them


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        console.print("  " + _plain(line), soft_wrap=True)


def _play(request: Request) -> RunFolder:
    """Run a lab before the reader's eyes, and print what came of it."""
    with ConsoleTeller() as teller:
        try:
            folder = run_lab(request, teller)
        except (KeyboardInterrupt, SystemExit):
            teller.step("Stopping: finished trials are kept, RESUME=1 goes on from there")
            raise
    summary, resolved = folder.summary(), folder.run().rebuilt_lab()
    for note in report.notes(folder.run(), summary):
        console.print(f"[bold yellow]{escape(note)}[/]")
    points = folder.run().points()
    teller.show(*report.points_table(points, resolved, summary, report.MAIN_COLUMNS))
    for title, lines in (
        ("The answer", report.answers(summary, resolved)),
        *((found.title, found.lines) for found in summary.findings),
        ("Validity", report.validity_lines(summary.caveats, resolved, len(summary.failed))),
    ):
        console.print(f"\n[bold]{title}[/]")
        for line in lines:
            console.print("  " + _plain(line))
    console.print(f"\nReport: [bold]{os.path.relpath(folder.path / 'report.md')}[/]")
    console.print("[dim]report.html beside it shows every request; a browser opens it.[/]")
    if summary.failed:
        console.print(
            f"Trials that failed: {len(summary.failed)}; the finished ones are kept. The first:"
            f" {escape(next(iter(summary.failed.values())))}"
        )
    return folder


class ConsoleTeller:
    """Shows a run: a live line with time remaining on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(30),
            TimeElapsedColumn(),
            TextColumn("[cyan]{task.fields[remaining]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("setting up", total=None, remaining="")
        self._began = time.monotonic()

    def __enter__(self) -> ConsoleTeller:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _elapsed(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        return f"[dim]{minutes}:{seconds:02}[/]"

    def step(self, text: str) -> None:
        console.print(f"{self._elapsed()} {escape(text)}")

    def plan(self, seconds: float) -> None:
        """From here on about this much is left."""
        done = time.monotonic() - self._began
        self._progress.update(self._task, total=done + seconds, completed=done)
        self.step(f"About {_minutes(seconds)} of load to come")

    def waiting(self, text: str) -> None:
        _heed()
        self._progress.update(
            self._task, description=escape(text), completed=time.monotonic() - self._began
        )

    def trial_done(self, text: str, remaining_s: float) -> None:
        _heed()
        done = time.monotonic() - self._began
        left = f"{_minutes(remaining_s)} left" if remaining_s else "last trial"
        self._progress.update(self._task, total=done + remaining_s, completed=done, remaining=left)
        console.print(f"{self._elapsed()} {escape(text)} [dim]({left})[/]")

    def show(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        show(title, rows)


def show(title: str, rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, head in enumerate(rows[0]):
        table.add_column(head, no_wrap=i == 0, justify="left" if i == 0 else "right")
    for row in rows[1:]:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)


def _plain(markdown_line: str) -> str:
    """Markdown's bold as the terminal's."""
    return re.sub(r"\*\*(.+?)\*\*", r"[bold]\1[/]", escape(markdown_line))


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _lab(name: str) -> Lab:
    if name not in LABS:
        raise LabError(f"there is no lab {name!r}; the labs are {', '.join(LABS)}")
    return LABS[name]


def _changes(text: str, seed: str = "") -> dict[str, Any]:
    return parse_changes(f"{text} seed={seed}" if seed else text)


def _parallel(tp: int, dp: int, pp: int) -> dict[str, int]:
    """As changes of a lab's flags; the run is marked with them as with any other."""
    asked = {"tensor": tp, "data": dp, "pipeline": pp}
    return {f"flags.{way}-parallel-size": n for way, n in asked.items() if n > 1}


def _folders(run: Path | None) -> list[RunFolder]:
    """The run named, or every run there is."""
    if run is None:
        return all_runs()
    return [open_run(run)]


_told: list[int] = []  # signals that asked us to end


def _stop(signum: int, frame: FrameType | None) -> None:
    _told.append(signum)
    _heed()


def _heed() -> None:
    """End if we were told to: what a handler raises is lost when it falls into a finalizer."""
    if _told:
        raise KeyboardInterrupt if _told[-1] == signal.SIGINT else SystemExit(128 + _told[-1])


@contextmanager
def _plainly() -> Iterator[None]:
    """Expected failures end in one sentence and exit code 1; SIGTERM and SIGHUP as Ctrl-C does."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _stop)
    try:
        yield
    except EXPECTED as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}")
        raise typer.Exit(1) from None
    except OSError as error:
        name = f" ({error.filename})" if error.filename else ""
        errors.print(
            f"[bold red]error:[/] {escape(str(error.strerror or error))}{escape(name)};"
            " finished trials are kept"
        )
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Stopped.")
        raise typer.Exit(130) from None


if __name__ == "__main__":
    app()
