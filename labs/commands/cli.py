"""The command line: `labs --help`. The Makefile's targets set up first, then call it.

What a reader sets behind a target (`make lab-x QUICK=1`) comes in the environment, under one
prefix: LABS_QUICK.

Here are the commands that run something; those about runs on file and about what is watched are in
modules of their own.
"""

from __future__ import annotations

import os
import shlex
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from labs import LABS
from labs.commands import all_labs, doctor, monitoring, recorded_runs
from labs.commands.interactive import PORT, WEB_PORT, start_locust_ui
from labs.commands.terminal import (
    EXPECTED,
    ConsoleProgress,
    console,
    errors,
    plainly,
    show,
)
from labs.comparing import reproduction, side_by_side
from labs.filing import manifest, newest
from labs.filing.results import RunFolder, open_run
from labs.lab import Lab, LabError, NotApplicable, did_you_mean, parse_changes
from labs.questions import QUESTIONS
from labs.running import derived_models, reproduce
from labs.running.resolve import RunRequest, is_dummy, model_of, require_devices
from labs.running.run import forecast_alone
from labs.running.run import run as run_lab
from labs.telling import report, tables
from labs.telling.document import Code, bullets, section, table_of
from serving import bundle, machine, models
from serving.engines import ENGINES
from serving.engines.vllm import Vllm
from serving.ports import require_port

app = typer.Typer(
    help="Ask a question about LLM inference serving; answer it by measuring this machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

LabName = Annotated[str, typer.Argument(help="A lab's name; `labs list` names them all.")]
SetOption = Annotated[
    str,
    typer.Option(
        "--set",
        envvar="LABS_SET",
        help="Change existing fields for this run: 'window_s=4 flags.max-num-seqs=8'."
        " The run is marked ad hoc.",
    ),
]
QuickOption = Annotated[
    bool, typer.Option(envvar="LABS_QUICK", help="Short windows, one repeat or two: a smoke test.")
]
EngineOption = Annotated[
    str,
    typer.Option(
        envvar="LABS_ENGINE_COMMAND",
        help="What starts the engine, its flags follow: to wrap vLLM in a profiler, say.",
    ),
]
ModelOption = Annotated[
    str, typer.Option("--model", envvar="LABS_MODEL", help="A model folder or a Hugging Face id.")
]
WeightsOption = Annotated[
    str,
    typer.Option(
        "--weights",
        envvar="LABS_WEIGHTS",
        help="`dummy` serves random weights in an architecture that ships with the lab (MODEL="
        " names it): speed is real, text is not.",
    ),
]
TpOption = Annotated[
    int, typer.Option("--tp", envvar="LABS_TP", min=1, help="GPUs that share each layer (tensors).")
]
DpOption = Annotated[
    int,
    typer.Option("--dp", envvar="LABS_DP", min=1, help="Copies of the model, each on its GPUs."),
]
PpOption = Annotated[
    int,
    typer.Option("--pp", envvar="LABS_PP", min=1, help="GPUs that share the layers (pipeline)."),
]
SeedOption = Annotated[
    str,
    typer.Option("--seed", envvar="LABS_SEED", help="Another draw of lengths, prompts and order."),
]


@app.command()
def run(
    lab: LabName,
    quick: QuickOption = False,
    aa: Annotated[
        bool,
        typer.Option(
            "--aa",
            envvar="LABS_AA",
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
            envvar="LABS_ENDPOINT",
            help="Drive this running OpenAI-compatible server, for a lab with one variant.",
        ),
    ] = "",
    seed: SeedOption = "",
    resume: Annotated[
        bool,
        typer.Option(
            envvar="LABS_RESUME", help="Go on with the newest unfinished run of this lab."
        ),
    ] = False,
    engine_command: EngineOption = "",
) -> None:
    """Run a lab: predict, measure, judge, report.

    `make lab-<name> VLLM=0.31.0` runs it with another vLLM, in an environment of its own.
    """
    with plainly():
        request = RunRequest(
            lab=_lab(lab),
            quick=quick,
            aa=aa,
            changes={**_parallel(tp, dp, pp), **_changes(changes, seed)},
            model=model,
            weights=weights,
            endpoint=endpoint,
            resume=resume,
            engine_command=_words(engine_command),
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
        bool, typer.Option(envvar="LABS_FRESH", help="Forget what an unfinished sitting has done.")
    ] = False,
) -> None:
    """Run every lab in order, go on where an earlier call stopped, and end in one page."""
    with plainly():
        parallel = _parallel(tp, dp, pp)
        state = all_labs.start(quick, model, fresh, weights, parallel)
        left: dict[str, str] = {}
        skipped: dict[str, str] = {}
        for place, (name, lab) in enumerate(LABS.items(), 1):
            console.print(f"\n[bold]Lab {place} of {len(LABS)}: {lab.title}[/]")
            if name in state.done:
                console.print(f"Done in this sitting: {state.done[name]}")
                continue
            request = RunRequest(
                lab, quick=quick, changes=dict(parallel), model=model, weights=weights,
                resume=state.begin(name),
            )  # fmt: skip
            try:
                folder = _play(request)
            except NotApplicable as reason:
                skipped[name] = str(reason)
                console.print(f"Skipped: {escape(str(reason))}")
                continue
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
        for name, why in skipped.items():
            console.print(f"Skipped: {name}: {escape(why)}")
        for name, why in left.items():
            console.print(f"Not finished: {name}: {escape(why)}")
        if left:
            console.print("`make labs-all` again runs only these.")
            raise typer.Exit(1)
        state.end()


@app.command("forecast")
def forecast_lab(
    lab: Annotated[str, typer.Option(envvar="LABS_LAB", help="Which lab's load points.")],
    quick: QuickOption = False,
    changes: SetOption = "",
    model: ModelOption = "",
    weights: WeightsOption = "",
    seed: SeedOption = "",
) -> None:
    """What a lab would show on this machine, in seconds: no engine is started, nothing is kept.

    vLLM's own scheduler plays every load point in virtual time, over a step of the model's shape
    that is timed here.
    """
    with plainly(), ConsoleProgress() as progress:
        request = RunRequest(
            _lab(lab), quick, changes=_changes(changes, seed), model=model, weights=weights
        )
        setup, forecasts = forecast_alone(request, progress)
        progress.show(
            section(
                f"{setup.lab.title}: forecast, nothing was measured",
                tables.in_virtual_time(setup.lab, forecasts),
                bullets(
                    (Code(name), f" has none: {why}") for name, why in forecasts.without.items()
                ),
            )
        )


@app.command("score-forecasts")
def score_forecasts() -> None:
    """How near the forecasts of the runs on file came to what was measured, lab by lab."""
    with plainly():
        show(section("Forecast beside measured", tables.residuals(newest.newest_runs())))


@app.command()
def make(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(derived_models.RECIPES)}.")],
    model: ModelOption = "",
    weights: WeightsOption = "",
    again: Annotated[
        bool, typer.Option(envvar="LABS_AGAIN", help="Make it anew where it is there already.")
    ] = False,
) -> None:
    """Make a model that labs derive from the served one; a lab makes what it needs by itself."""
    with plainly():
        served = model_of(machine.detect(), model, weights)
        if again and (place := derived_models.place(served, name)).is_relative_to(models.CACHE):
            shutil.rmtree(place, ignore_errors=True)
        folder = derived_models.make(served, name, lambda line: console.print(escape(line)))
        for key, value in derived_models.about(folder).items():
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
    lab: Annotated[str, typer.Option(envvar="LABS_LAB", help="Whose engine settings.")],
    variant: Annotated[str, typer.Option(envvar="LABS_VARIANT", help="Default: the first.")] = "",
    port: Annotated[int, typer.Option(envvar="LABS_PORT", min=1, max=65535)] = PORT,
    changes: SetOption = "",
    model: ModelOption = "",
    weights: WeightsOption = "",
    tp: TpOption = 1,
    dp: DpOption = 1,
    pp: PpOption = 1,
) -> None:
    """Start a variant's engine in the foreground; Ctrl-C ends it."""
    with plainly():
        host = machine.detect()
        asked = {**_parallel(tp, dp, pp), **_changes(changes)}
        resolved = _lab(lab).at(models.scale_of(host), False, asked, is_dummy(weights))
        require_devices(resolved, host)
        by_name = {v.name: v for v in resolved.variants}
        if variant and variant not in by_name:
            raise LabError(f"{lab} has no variant {variant!r}; it has {', '.join(by_name)}")
        chosen = by_name[variant] if variant else resolved.variants[0]
        engine, flags = ENGINES[chosen.engine], resolved.flags_of(chosen)
        served = model_of(host, model, weights)
        require_port(port, "PORT")
        engine.check_flags([flags])
        argv = [*engine.command, *engine.server_argv(served, flags, port)]
        known = host.kind == "cpu" and engine.start_s
        soon = f"in about {engine.start_s:.0f} s" if known else "in a minute or more"
        console.print(f"Serving {served.name} at http://127.0.0.1:{port} (ready {soon}):")
        console.print("python " + escape(" ".join(argv[1:])), style="dim")
        env = engine.environment(host.kind, served, resolved.all_flags)
        os.execve(argv[0], argv, {**os.environ, **env})


@app.command()
def locust(
    lab: Annotated[str, typer.Option(envvar="LABS_LAB", help="Whose workload.")],
    workload: Annotated[str, typer.Option(envvar="LABS_WORKLOAD", help="Default: the first.")] = "",
    endpoint: Annotated[
        str,
        typer.Option(envvar="LABS_ENDPOINT", help="The server to drive; `make serve` starts one."),
    ] = f"http://127.0.0.1:{PORT}",
    web_port: Annotated[int, typer.Option(envvar="LABS_WEB_PORT", min=1, max=65535)] = WEB_PORT,
    changes: SetOption = "",
    model: ModelOption = "",
    weights: WeightsOption = "",
) -> None:
    """Open Locust's own web UI on a lab's workload, for turning knobs by hand."""
    with plainly():
        require_port(web_port, "WEB_PORT")
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


@app.command("reproduce")
def reproduce_run(
    run: Annotated[Path, typer.Option("--run", envvar="LABS_RUN", help="The run to repeat.")],
    model: ModelOption = "",
    resume: Annotated[
        bool, typer.Option(envvar="LABS_RESUME", help="Go on with an unfinished reproduction.")
    ] = False,
    engine_command: EngineOption = "",
) -> None:
    """Run a run on file again, and say which of its figures and verdicts came out the same."""
    with plainly():
        original = open_run(run)
        before = original.run()
        asked = reproduce.request(before, model, resume, _words(engine_command))
        for note in reproduce.notes(before, Vllm.version()):
            console.print(f"[bold yellow]{escape(note)}[/]")
        differ = manifest.table(reproduce.differs_here(before, asked), ("there", "here"))
        if len(differ) > 1:
            show(section("What differs here", table_of(differ)))
        folder = _play(asked)
        if not folder.complete:
            raise LabError("some of its trials failed: try the rest again with RESUME=1")
        found = reproduction.answer(original, folder)
        show(
            section(
                "Reproduced?",
                bullets(reproduction.lines(found)),
                section("What was not reproduced", side_by_side.figure_table(found.apart)),
            )
        )
        page = folder.path / "reproduction.md"
        console.print(f"Every figure: [bold]{os.path.relpath(page)}[/]", soft_wrap=True)
        filed = os.path.relpath(reproduction.file(found, original))
        console.print(f"Filed with the original, to be published: [bold]{filed}[/]", soft_wrap=True)
        if not found.verdicts_agree:
            raise typer.Exit(1)


@app.command("doctor")
def examine(model: ModelOption = "", weights: WeightsOption = "") -> None:
    """What this machine has and lacks, how to mend it, and which labs can run."""
    with plainly():
        lines, abilities = doctor.examine(model, weights)
        found = Table("Part", "Found", "To mend it", title="This machine", title_justify="left")
        for line in lines:
            found.add_row(line.part, escape(line.found), f"[bold red]{escape(line.mend)}[/]")
        console.print(found)
        able = Table("Lab", "Runs here", "", title="Labs", title_justify="left")
        for a in abilities:
            runs = {True: "yes", False: "[bold red]no[/]", None: "does not apply"}[a.able]
            able.add_row(a.lab, runs, escape(a.note))
        console.print(able)
        if any(a.able is False for a in abilities):
            raise typer.Exit(1)


@app.command("bundle")
def make_bundle(
    platform: Annotated[str, typer.Option("--for", envvar="LABS_FOR", help="cuda.")] = "cuda",
    python_version: Annotated[
        str, typer.Option(envvar="LABS_PYTHON_VERSION", help="Of the other machine's Python.")
    ] = "3.12",
    have: Annotated[
        Path | None,
        typer.Option(envvar="LABS_HAVE", help="A file with the other machine's `pip list`."),
    ] = None,
    without: Annotated[
        str,
        typer.Option(
            envvar="LABS_WITHOUT", help="Packages to leave out with all that only they need."
        ),
    ] = "",
    vllm: Annotated[
        str,
        typer.Option(envvar="LABS_VLLM", help="Its version; default: what fits the torch there."),
    ] = "",
    part: Annotated[
        str, typer.Option(envvar="LABS_PART", help="Size of a part: bytes, or such as 60M, 2G.")
    ] = "1G",
    out: Annotated[Path, typer.Option(envvar="LABS_OUT", help="The folder for the parts.")] = Path(
        "bundle"
    ),
) -> None:
    """Gather all a GPU machine without internet needs, in parts with checksums."""
    with plainly():
        bundle.check(platform, python_version)
        wanted = bundle.BundleRequest(
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


for panel, part in (("Runs on file", recorded_runs.app), ("What is watched", monitoring.app)):
    for command in part.registered_commands:
        command.rich_help_panel = panel
        app.registered_commands.append(command)


# --------------------------------------------------------------------------------- for all of them


def _play(request: RunRequest) -> RunFolder:
    """Run a lab before the reader's eyes, and print what came of it."""
    with ConsoleProgress() as progress:
        try:
            folder = run_lab(request, progress)
        except (KeyboardInterrupt, SystemExit, OSError):
            progress.message("Stopping: finished trials are kept, RESUME=1 goes on from there")
            raise
    summary = folder.summary()
    progress.show(report.digest(report.Facts.of(folder)))
    console.print(f"\nReport: [bold]{os.path.relpath(folder.path / 'report.md')}[/]")
    console.print("[dim]report.html beside it shows every request; a browser opens it.[/]")
    if summary.failed:
        console.print(
            f"Trials that failed: {len(summary.failed)}; the finished ones are kept. The first:"
            f" {escape(next(iter(summary.failed.values())))}"
        )
    return folder


def _lab(name: str) -> Lab:
    if name not in LABS:
        raise LabError(f"there is no lab {name!r}{did_you_mean(name, LABS)} are {', '.join(LABS)}")
    return LABS[name]


def _words(command: str) -> list[str]:
    """Of ENGINE_COMMAND; raises LabError where there is nothing to start."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise LabError(f"ENGINE_COMMAND={command}: {error}") from error
    if words and shutil.which(words[0]) is None:
        raise LabError(f"ENGINE_COMMAND: there is no program {words[0]}: install it, or correct it")
    return words


def _changes(text: str, seed: str = "") -> dict[str, Any]:
    return parse_changes(f"{text} seed={seed}" if seed else text)


def _parallel(tp: int, dp: int, pp: int) -> dict[str, int]:
    """As changes of a lab's flags; the run is marked with them as with any other."""
    asked = {"tensor": tp, "data": dp, "pipeline": pp}
    return {f"flags.{way}-parallel-size": n for way, n in asked.items() if n > 1}


if __name__ == "__main__":
    app()
