"""The command line: `labs --help`. The Makefile's targets set up first, then call it.

A setting behind a target (`make lab-x QUICK=1`) comes in the environment, under one prefix:
LABS_QUICK.

This module has the commands that run something; `recorded_runs` has those about recorded runs,
`monitoring` those about Prometheus and Grafana.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from labs import LABS
from labs.harness.changes import parse_changes
from labs.harness.commands import (
    all_labs,
    diagnosing,
    doctor,
    environment,
    monitoring,
    planning,
    recorded_runs,
)
from labs.harness.commands.interactive import PORT, WEB_PORT, start_locust_ui
from labs.harness.commands.load_worker import send_load
from labs.harness.commands.options import (
    ALL,
    DpOption,
    EngineOption,
    FleetOption,
    KeyOption,
    LabName,
    ListenOption,
    LoadWorkersOption,
    MarkdownOut,
    ModelOption,
    PpOption,
    PriceOption,
    QuickOption,
    ReplicasOption,
    RouterOption,
    SeedOption,
    SetOption,
    SloOption,
    TpOption,
    TraceOption,
    UnsafeOption,
    WeightsOption,
    addresses,
    price_of,
    recorded_machine,
    routers_of,
    settings_of,
    slo_of,
    trace_of,
)
from labs.harness.commands.terminal import (
    EXPECTED_ERRORS,
    ConsoleProgress,
    console,
    errors,
    refusal_of,
    reported_errors,
    show,
    shown_path,
)
from labs.harness.comparing import compare, reproduction, side_by_side
from labs.harness.errors import did_you_mean
from labs.harness.filing import archive, manifest, results
from labs.harness.filing.results import RunFolder, open_run
from labs.harness.questions import QUESTIONS
from labs.harness.running import derived_models, reproduce
from labs.harness.running.clock import Clock, TimeUsedUp
from labs.harness.running.forecast import FleetSize
from labs.harness.running.resolve import (
    RunRequest,
    Setup,
    is_dummy,
    machine_of,
    model_for,
    model_of,
    require_devices,
    require_harmless,
)
from labs.harness.running.resume import CannotResume
from labs.harness.running.run import forecast_alone, forecast_fleets_alone
from labs.harness.running.run import run as run_lab
from labs.harness.spec import Lab, LabError, NotApplicable, Variant
from labs.harness.telling import forecasts, markdown, report
from labs.harness.telling.document import Paragraph, Section, bullets, section, table_of
from loadtests.trace import MOST_ROWS, TraceRow
from serving import bundle, whole
from serving.engines import ENGINES
from serving.engines.flags import with_places
from serving.engines.vllm import Vllm
from serving.hardware import machine
from serving.hardware.gpus import short_names
from serving.processes.masking import holds_secret, masked, recordable, tellable
from serving.processes.ports import require_port
from serving.weights import models

HELP = "Ask a question about LLM inference serving; answer it by measuring this machine."

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(help=HELP)
def before_every_command(context: typer.Context) -> None:
    """Refuse settings behind a target that it does not take; warn of those that nothing reads."""
    with reported_errors():
        given = os.environ.pop(environment.BEHIND_MAKE, "")
        require_settings_taken(context.invoked_subcommand or "", given)
    for sentence in environment.unread(os.environ):
        errors.print(f"[bold yellow]warning:[/] {escape(sentence)}")


def require_settings_taken(called: str, given: str) -> None:
    """Raise LabError for a setting that another command takes and the one that is called does not.

    `given` are the names of settings, separated by spaces.
    """
    takes = {
        info.name or info.callback.__name__: settings_of(info.callback)
        for info in app.registered_commands
        if info.callback
    }
    if called not in takes:
        return
    if refusal := environment.not_taken(given, takes[called], set().union(*takes.values())):
        raise LabError(refusal)


@app.command()
def run(
    lab: LabName,
    quick: QuickOption = False,
    aa: Annotated[
        bool,
        typer.Option(
            "--aa",
            envvar="LABS_AA",
            help="Run the lab's baseline against itself: every difference is then noise.",
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
            help="Send the load to this running OpenAI-compatible server; only for a lab with one"
            " variant.",
        ),
    ] = "",
    endpoint_metrics: ReplicasOption = "",
    load_workers: LoadWorkersOption = 0,
    listen: ListenOption = "",
    key: KeyOption = "",
    seed: SeedOption = "",
    resume: Annotated[
        bool,
        typer.Option(
            envvar="LABS_RESUME", help="Continue the newest unfinished run with these settings."
        ),
    ] = False,
    engine_command: EngineOption = "",
    price: PriceOption = 0.0,
    unsafe_flags: UnsafeOption = False,
) -> None:
    """Run a lab: predict, measure, judge, report.

    `make lab-<name> VLLM=0.31.0` runs it with another vLLM, in an environment of its own. Behind
    make, DISTURBED=, RESULTS= and SCRATCH= are settings too, which have no option here:
    docs/knobs.md explains them.
    """
    with reported_errors():
        request = RunRequest(
            lab=_lab(lab),
            quick=quick,
            aa=aa,
            changes={**_parallel(tp, dp, pp), **_changes(changes, seed)},
            model=model,
            weights=weights,
            endpoint=endpoint,
            replicas=addresses(endpoint_metrics),
            load_workers=load_workers,
            listen=listen,
            key=key,
            resume=resume,
            engine_command=_command_words(engine_command),
            usd_per_hour=price_of(price),
            unsafe_flags=unsafe_flags,
        )
        if not _play(request).complete:
            console.print("Some trials failed: RESUME=1 plays them again.")
            raise typer.Exit(1)


@app.command("all")
def run_all(
    quick: QuickOption = False,
    changes: SetOption = "",
    model: ModelOption = "",
    weights: WeightsOption = "",
    tp: TpOption = 1,
    dp: DpOption = 1,
    pp: PpOption = 1,
    fresh: Annotated[
        bool,
        typer.Option(
            envvar="LABS_FRESH", help="Start over, instead of continuing an earlier call."
        ),
    ] = False,
    only: Annotated[
        str,
        typer.Option(
            envvar="LABS_ONLY",
            help="Labs, separated by commas, in the order in which they are to run.",
        ),
    ] = "",
    seconds: Annotated[
        float | None,
        typer.Option(
            envvar="LABS_SECONDS",
            min=1,
            help="How long this call may last: nothing is begun that would not finish in time"
            " (exit code 75), and the next call continues. `labs report` writes the reports.",
        ),
    ] = None,
    archive_file: Annotated[
        Path | None,
        typer.Option(
            "--archive",
            envvar="LABS_ARCHIVE",
            help="Pack all results and logs into this .tar.gz after every lab, also one that"
            " failed.",
        ),
    ] = None,
    engine_command: EngineOption = "",
    price: PriceOption = 0.0,
) -> None:
    """Run every lab in order, continuing where an earlier call stopped; write one page of all."""
    with reported_errors():
        _require_no_setting_of_one_lab()
        chosen = all_labs.chosen(only, by_value=seconds is not None)
        all_changes = {**_parallel(tp, dp, pp), **_changes(changes)}
        state = all_labs.start(quick, model, fresh, weights, all_changes)
        clock = Clock.of(seconds, state.starts_s, state.preparations_s)
        request = RunRequest(
            next(iter(LABS.values())), quick=quick, changes=all_changes, model=model,
            weights=weights, engine_command=_command_words(engine_command), clock=clock,
            usd_per_hour=price_of(price),
        )  # fmt: skip
        if clock.bounded:
            console.print(
                f"This call may last {seconds:.0f} s, and an engine has"
                f" {clock.start_timeout_s:.0f} s to start"
            )
        try:
            sitting = _sitting(request, chosen, state, archive_file)
        finally:
            _pack(archive_file)
        if not clock.bounded and (page := state.page()):
            console.print(f"\nEvery lab on one page: [bold]{shown_path(page)}[/]")
        for name, why in sitting.skipped.items():
            console.print(f"Skipped: {name}: {escape(why)}")
        for name, why in sitting.not_finished.items():
            console.print(f"Not finished: {name}: {escape(why)}")
        if sitting.time_used_up:
            left = [name for name in chosen if name not in {*state.done, *sitting.skipped}]
            console.print(f"To be done: {', '.join(left)}. The same call goes on with them.")
            raise typer.Exit(os.EX_TEMPFAIL)
        if sitting.not_finished:
            again = [name for name in sitting.not_finished if not state.is_hopeless(name)]
            if again:
                console.print(f"Call `make labs-all` again: it runs only {', '.join(again)}.")
            raise typer.Exit(1)
        if clock.bounded:
            console.print("Everything is done: FRESH=1 starts over.")
        else:
            state.end(chosen)


def _require_no_setting_of_one_lab() -> None:
    """Refuse settings that a single lab takes and all of them together do not. Raises LabError.

    All labs together always continue, so that RESUME in the environment changes nothing.
    """
    of_one_lab = settings_of(run) - settings_of(run_all) - {"LABS_RESUME"}
    if given := sorted(name for name in of_one_lab if os.environ.get(name)):
        names = ", ".join(name.removeprefix(environment.PREFIX) + "=" for name in given)
        raise LabError(f"{names}: not for all labs together; give it to one, `make lab-<name>`")


@dataclass
class _Sitting:
    """Holds what became of the labs that a call has tried."""

    skipped: dict[str, str] = field(default_factory=dict)
    not_finished: dict[str, str] = field(default_factory=dict)
    time_used_up: bool = False


def _sitting(
    request: RunRequest, chosen: Sequence[str], state: all_labs.Sitting, archive_file: Path | None
) -> _Sitting:
    """Run the chosen labs that are not done, as far as the request's clock allows."""
    clock, sitting = request.clock, _Sitting()
    host = machine.detect()
    all_labs.check_flags([name for name in chosen if name not in state.done], [request], host)
    for name in state.give_up(chosen):
        console.print(
            f"{name} was begun {state.in_vain[name]} times without finishing a trial: it is taken"
            " to have failed, and comes last"
        )
    for number, name in enumerate(state.order(chosen), 1):
        lab = LABS[name]
        console.print(f"\n[bold]Lab {number} of {len(chosen)}: {lab.title}[/]")
        if name in state.done:
            console.print(f"Done by an earlier call: {escape(state.done[name])}")
            continue
        if state.is_hopeless(name):
            sitting.not_finished[name] = (
                f"{state.in_vain[name]} calls were ended in it before it finished a trial, so it is"
                f" not begun again: `make lab-{name}` runs it alone"
            )
            console.print(f"Not begun again: {sitting.not_finished[name]}")
            continue
        try:
            clock.require(clock.preparation_s(host.kind) + clock.start_s(host.kind), lab.name)
            folder = _begin_or_continue(replace(request, lab=lab), state)
        except TimeUsedUp as reason:
            console.print(f"The time for this call is used up: {escape(str(reason))}")
            sitting.time_used_up = True
            break
        except NotApplicable as reason:
            sitting.skipped[name] = str(reason)
            console.print(f"Skipped: {escape(str(reason))}")
        except Exception as error:
            sitting.not_finished[name] = _what_stopped(error, name, host.slug)
            state.fail(name)
            errors.print(f"[bold red]error:[/] {escape(sitting.not_finished[name])}")
            _pack_between(archive_file)
        else:
            if folder.complete:
                state.finish(name, folder.path)
            else:
                sitting.not_finished[name] = "some of its trials failed"
                state.fail(name)
            _pack_between(archive_file)
        finally:
            state.time(clock)
    return sitting


def _begin_or_continue(request: RunRequest, state: all_labs.Sitting) -> RunFolder:
    """Run the request's lab; only an end of the whole call is held against it.

    In a call without a time limit, Ctrl-C is a person's own decision, and not held against it.
    """
    resume = state.begin(request.lab.name)
    excused = (Exception,) if request.clock.bounded else (Exception, KeyboardInterrupt)
    try:
        folder = _play_or_begin_anew(replace(request, resume=resume))
    except excused:
        state.excuse(request.lab.name)
        raise
    state.excuse(request.lab.name)
    return folder


def _what_stopped(error: Exception, lab: str, machine_slug: str) -> str:
    """Say in a sentence what ended a lab.

    What has no sentence for the reader is a fault of the lab or of the machine: its traceback is
    written beside the lab's results, without secrets, and the sentence names the file.
    """
    if isinstance(error, EXPECTED_ERRORS):
        return tellable(str(error))
    what = refusal_of(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    log = results.RESULTS / machine_slug / lab / f"error-{results.moment()}.log"
    try:
        whole.write(log, recordable(tellable("".join(traceback.format_exception(error)))))
    except OSError:  # as on a full disk, which may be what ended the lab
        return tellable(what)
    return f"{tellable(what)} (traceback: {os.path.relpath(log)})"


def _pack_between(file: Path | None) -> None:
    """Pack between two labs: an archive that cannot be written ends no sitting."""
    try:
        _pack(file)
    except OSError as error:
        errors.print(f"[bold red]error:[/] {escape(refusal_of(error))}")


def _pack(file: Path | None) -> None:
    """Write the archive of this machine's results anew, where one is asked for."""
    if file and (written := archive.write_here(file)):
        size = sum(path.stat().st_size for path in written) / 1e6
        names = ", ".join(path.name for path in written)
        console.print(f"[dim]Packed into {escape(names)}: {size:.1f} MB[/]")


@app.command("forecast")
def forecast_lab(
    lab: Annotated[
        str,
        typer.Option(
            envvar="LABS_LAB",
            help="The lab whose load points to forecast, several (`a,b`), or `all`.",
        ),
    ],
    card: Annotated[
        str,
        typer.Option(
            "--machine",
            envvar="LABS_MACHINE",
            help=f"A GPU that this machine need not have: {', '.join(short_names())}. Its steps are"
            " computed from its datasheet and published efficiencies; MODEL= names a shape that"
            " ships with the lab, or a model folder. Or a machine on file, by the name of its"
            " folder in results/, or one of its runs, which timed the step of its model.",
        ),
    ] = "",
    tp: TpOption = 1,
    trace: TraceOption = None,
    replicas: FleetOption = 0,
    router: RouterOption = ALL,
    slo: SloOption = "",
    out: MarkdownOut = None,
    quick: QuickOption = False,
    changes: SetOption = "",
    model: ModelOption = "",
    weights: WeightsOption = "",
    seed: SeedOption = "",
    unsafe_flags: UnsafeOption = False,
) -> None:
    """Forecast a lab, in seconds to a few minutes: no engine is started, nothing is recorded.

    vLLM's own scheduler plays every load point in virtual time, over a step of the model's shape
    that is timed on this machine. `MACHINE=h100` forecasts it for a GPU that is not here instead,
    `TP=4` for several of these that share each layer, `MACHINE=` with a folder of results for a
    machine that was measured. `TRACE=` puts the lab's engines under your traffic in place of the
    lab's loads, and goodput counts what meets the objective `SLO=`. `REPLICAS=4` sets so many of
    each engine behind a router, which shares the requests of open loads among them.
    """
    with reported_errors(), ConsoleProgress() as progress:
        on_file = recorded_machine(card, model)
        if on_file:
            model, weights = model or on_file.model, on_file.weights
        elif card and not (model and Path(model).is_dir()):
            weights = "dummy"  # of a GPU that is not here only the shape counts
        all_changes = {**_parallel(tp, dp=1, pp=1), **_objective(slo), **_changes(changes, seed)}
        rows = trace_of(trace, progress.waiting) if trace else ()
        size = _fleet_size(replicas, router, rows)
        if not on_file:
            machine_of(card)  # refused once, and not for each lab
        written, without = [], list[str]()
        labs = list(LABS.values()) if lab == "all" else [_lab(name) for name in lab.split(",")]
        for chosen in labs:
            request = RunRequest(
                chosen, quick, changes=all_changes, model=model,
                weights=weights, card=card, on_file=on_file,
                unsafe_flags=unsafe_flags, trace=rows,
            )  # fmt: skip
            try:
                page = _forecast_page(request, size, progress)
            except NotApplicable as reason:
                page = section(chosen.title, Paragraph(str(reason)))
            except EXPECTED_ERRORS as reason:
                if len(labs) == 1:
                    raise
                without.append(chosen.name)
                page = section(chosen.title, Paragraph(f"No forecast: {reason}"))
            progress.show(page)
            written.append(page)
        if out:
            only = written[0] if len(written) == 1 else section("Forecasts", *written)
            whole.write(out, markdown.document(only))
        if without:
            raise LabError(f"labs without a forecast, for the reasons above: {', '.join(without)}")


def _fleet_size(replicas: int, router: str, trace: Sequence[TraceRow]) -> FleetSize | None:
    """Say how many of each engine are forecast; None where a lab's own forecast is asked for.

    A trace that is too long for a run is played as a fleet is, of one, which keeps less of it.
    Raises LabError.
    """
    routers = routers_of(router)
    if replicas:
        return FleetSize(replicas, routers if replicas > 1 else routers[:1])
    if router != ALL:
        raise LabError(f"ROUTER={router} has nothing to route to: say how many with REPLICAS=")
    return FleetSize(1, routers[:1]) if len(trace) > MOST_ROWS else None


def _forecast_page(
    request: RunRequest, size: FleetSize | None, progress: ConsoleProgress
) -> Section:
    """Forecast a lab, or its engines as fleets, and tell it."""
    if size:
        setup, fleets = forecast_fleets_alone(request, size, progress)
        return forecasts.page_of_fleets(_basis(setup), size.replicas, fleets.points, fleets.without)
    setup, predictions = forecast_alone(request, progress)
    return forecasts.page(_basis(setup), predictions)


def _basis(setup: Setup) -> forecasts.Basis:
    run = setup.on_file.run if setup.on_file else ""
    return forecasts.Basis(setup.lab, setup.model.name, setup.machine, not setup.elsewhere, run)


@app.command()
def make(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(derived_models.RECIPES)}.")],
    model: ModelOption = "",
    weights: WeightsOption = "",
    again: Annotated[
        bool,
        typer.Option(
            envvar="LABS_AGAIN",
            help="Make it here anew, where it exists already or can be downloaded.",
        ),
    ] = False,
) -> None:
    """Make a model derived from the served one. A lab makes the models it needs by itself.

    What others have published in its place is downloaded, except with AGAIN=1.
    """
    with reported_errors():
        served = model_of(machine.detect(), model, weights)
        if again and name in derived_models.RECIPES:
            shutil.rmtree(derived_models.place(served, name), ignore_errors=True)
        folder = derived_models.make(served, name, _say, made_here=again)
        for key, value in derived_models.about(folder).items():
            console.print(f"  {key}: {escape(str(value))}", style="dim")
        console.print(f"The model is in [bold]{shown_path(folder)}[/]")


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
    lab: Annotated[
        str, typer.Option(envvar="LABS_LAB", help="The lab whose engine settings to use.")
    ],
    variant: Annotated[
        str, typer.Option(envvar="LABS_VARIANT", help="A variant of the lab; default: the first.")
    ] = "",
    port: Annotated[
        int, typer.Option(envvar="LABS_PORT", min=1, max=65535, help="The port of the engine.")
    ] = PORT,
    changes: SetOption = "",
    model: ModelOption = "",
    weights: WeightsOption = "",
    tp: TpOption = 1,
    dp: DpOption = 1,
    pp: PpOption = 1,
    unsafe_flags: UnsafeOption = False,
) -> None:
    """Start the engine of a lab's variant in the foreground; Ctrl-C ends it."""
    with reported_errors():
        host = machine.detect()
        all_changes = {**_parallel(tp, dp, pp), **_changes(changes)}
        resolved = _lab(lab).at(models.scale_of(host), False, all_changes, is_dummy(weights))
        if not unsafe_flags:
            require_harmless(resolved)
        require_devices(resolved, host)
        chosen = _variant_on_vllm(resolved, variant)
        flags, served = resolved.flags_of(chosen), model_for(resolved, host, model, weights)
        require_port(port, "PORT")
        Vllm.check_flags([flags])
        alone = resolved.model_copy(update={"variants": (chosen,), "studies": ()})
        places = {
            name: derived_models.make(served, name, _say, made_here=alone.made_here)
            for name in alone.derived()
        }
        if chosen.weights:
            served = derived_models.with_weights(served, chosen.weights, places[chosen.weights])
        argv = Vllm.server_argv(served, with_places(flags, places), port)
        argv = [*Vllm.server_command(flags), *argv]
        soon = f"in about {Vllm.start_s:.0f} s" if host.kind == "cpu" else "in a minute or more"
        console.print(f"Serving {escape(served.name)} at http://127.0.0.1:{port} (ready {soon}):")
        console.print("python " + escape(" ".join(argv[1:])), style="dim")
        env = Vllm.environment(host.kind, served, resolved.all_flags)
        os.execve(argv[0], argv, {**os.environ, **env})


def _variant_on_vllm(lab: Lab, name: str) -> Variant:
    """Find a variant by its name, or take the first. Raises LabError unless vLLM serves it."""
    by_name = {v.name: v for v in lab.variants}
    if name and name not in by_name:
        raise LabError(f"{lab.name} has no variant {name!r}; it has {', '.join(by_name)}")
    chosen = by_name[name] if name else lab.variants[0]
    if (engine := ENGINES[chosen.engine]) is not Vllm:
        raise LabError(
            f"{chosen.name} is served by {engine.title}, and this command starts vLLM alone: choose"
            " another VARIANT"
        )
    return chosen


@app.command()
def locust(
    lab: Annotated[str, typer.Option(envvar="LABS_LAB", help="The lab whose workload to send.")],
    workload: Annotated[
        str, typer.Option(envvar="LABS_WORKLOAD", help="A workload of the lab; default: the first.")
    ] = "",
    endpoint: Annotated[
        str,
        typer.Option(
            envvar="LABS_ENDPOINT", help="The server to send load to; `make serve` starts one."
        ),
    ] = f"http://127.0.0.1:{PORT}",
    web_port: Annotated[
        int,
        typer.Option(envvar="LABS_WEB_PORT", min=1, max=65535, help="The port of Locust's web UI."),
    ] = WEB_PORT,
    changes: SetOption = "",
    model: ModelOption = "",
    weights: WeightsOption = "",
) -> None:
    """Open Locust's own web UI on a lab's workload, to change the load by hand."""
    with reported_errors():
        require_port(web_port, "WEB_PORT")
        with start_locust_ui(
            _lab(lab), _changes(changes), workload, endpoint, model, weights, web_port
        ) as process:
            console.print(
                f"Locust at http://127.0.0.1:{web_port} sends load to {endpoint}. Choose the number"
                " of users on that page. Ctrl-C ends it."
            )
            while process.returncode is None:
                time.sleep(0.5)
            raise LabError(f"Locust ended; its last lines:\n{process.tail()}")


@app.command("load-worker")
def load_worker(
    master: Annotated[
        str,
        typer.Option(
            "--master", envvar="LABS_MASTER", help="host:port, as the run on that machine shows it."
        ),
    ],
    key: Annotated[
        str,
        typer.Option(
            "--key",
            envvar="LABS_KEY",
            show_default=False,
            help="The key that the run shows; asked for where it is not given. A command line can"
            " be read by everybody on the machine.",
        ),
    ] = "",
) -> None:
    """Send a share of the load of a run on another machine, as one more load process, to its end.

    The run there was started with ENDPOINT= and LOAD_WORKERS=. Both machines need the same commit
    and must reach the endpoint by the same address, with the same VLLM_API_KEY where it asks for
    one.
    """
    with reported_errors():
        if not key and not sys.stdin.isatty():
            raise LabError("the key that the run shows is missing: give it in LABS_KEY")
        key = key or typer.prompt("The key that the run shows", hide_input=True)
        send_load(master, key, _say)
        console.print("The run has ended.")


@app.command("reproduce")
def reproduce_run(
    run: Annotated[Path, typer.Option("--run", envvar="LABS_RUN", help="The run to repeat.")],
    model: ModelOption = "",
    resume: Annotated[
        bool, typer.Option(envvar="LABS_RESUME", help="Continue an unfinished reproduction.")
    ] = False,
    engine_command: EngineOption = "",
    price: PriceOption = 0.0,
) -> None:
    """Repeat a recorded run, and say which of its figures and verdicts came out the same.

    Exit code 0: every verdict was reproduced; 1: one was not, or the repetition failed; 2: the
    repeats do not decide it.
    """
    with reported_errors():
        original = compare.read_side(str(open_run(run).path)).folder
        original_run = original.run()
        request = reproduce.request(original_run, model, resume, _command_words(engine_command))
        for note in reproduce.notes(original_run, Vllm.version()):
            console.print(f"[bold yellow]{escape(note)}[/]")
        differ = manifest.table(reproduce.differs_here(original_run, request), ("there", "here"))
        if len(differ) > 1:
            show(section("What differs here", table_of(differ)))
        folder = _play(replace(request, usd_per_hour=price_of(price)))
        if not folder.complete:
            raise LabError("some trials of the reproduction failed: RESUME=1 plays them again")
        result = reproduction.compare_with_original(original, folder)
        show(
            section(
                "Reproduced?",
                bullets(reproduction.sentences(result)),
                section(
                    "What was not reproduced, or is undecided",
                    side_by_side.figure_table(result.apart),
                ),
            )
        )
        page = folder.path / "reproduction.md"
        console.print(f"Every figure: [bold]{shown_path(page)}[/]", soft_wrap=True)
        filed = shown_path(reproduction.file_with_original(result, original))
        console.print(f"Filed with the original run: [bold]{filed}[/]", soft_wrap=True)
        raise typer.Exit(result.exit_code)


@app.command("doctor")
def examine(model: ModelOption = "", weights: WeightsOption = "") -> None:
    """Check what this machine has and lacks, how to mend it, and which labs can run."""
    with reported_errors():
        checks, abilities = doctor.examine(model, weights)
        checks_table = Table(
            "Part", "State", "What to do", title="This machine", title_justify="left"
        )
        for check in checks:
            remedy = f"[bold red]{escape(check.remedy)}[/]"
            checks_table.add_row(check.part, escape(check.state), remedy)
        console.print(checks_table)
        labs_table = Table("Lab", "Runs here", "", title="Labs", title_justify="left")
        for a in abilities:
            runs = {True: "yes", False: "[bold red]no[/]", None: "does not apply"}[a.able]
            labs_table.add_row(a.lab, runs, escape(a.note))
        console.print(labs_table)
        if planned := doctor.session(abilities):
            console.print("[bold]A session on this GPU, with QUICK=1 WEIGHTS=dummy[/]")
            console.print(planned, markup=False, soft_wrap=True)
        if any(a.able is False for a in abilities):
            raise typer.Exit(1)


@app.command("bundle")
def make_bundle(
    python_version: Annotated[
        str,
        typer.Option(
            envvar="LABS_PYTHON_VERSION", help="The version of the other machine's Python."
        ),
    ] = "3.12",
    have: Annotated[
        Path | None,
        typer.Option(
            envvar="LABS_HAVE", help="A file with the output of `pip list` on the other machine."
        ),
    ] = None,
    vllm: Annotated[
        str,
        typer.Option(
            envvar="LABS_VLLM",
            help="The version of vLLM; default: the one that fits the torch on that machine.",
        ),
    ] = "",
    part: Annotated[
        str, typer.Option(envvar="LABS_PART", help="The size of a part: in bytes, or as 60M or 2G.")
    ] = "1G",
    with_tree: Annotated[
        str,
        typer.Option(
            envvar="LABS_WITH_TREE",
            help="Instead of --part: the most that may be sent at once, such as 64M, where this"
            " checkout is sent along with each part.",
        ),
    ] = "",
    lean: Annotated[
        bool,
        typer.Option(
            "--lean", envvar="LABS_LEAN", help="Only what serves random weights on an H100 or H200."
        ),
    ] = False,
    out: Annotated[Path, typer.Option(envvar="LABS_OUT", help="The folder for the parts.")] = Path(
        "bundle"
    ),
) -> None:
    """Gather all that a GPU machine without internet needs, in parts with checksums."""
    with reported_errors():
        wanted = bundle.BundleRequest(
            python=python_version,
            have=bundle.read_have(have) if have else {},
            vllm=vllm,
            part_bytes=bundle.fitting(with_tree) if with_tree else bundle.part_size(part),
            lean=lean,
        )
        bundle.bundle(
            wanted, out.resolve(), lambda line: console.print(escape(line), soft_wrap=True)
        )


for panel, part in (
    ("Forecasts", planning.app),
    ("Recorded runs", recorded_runs.app),
    ("A running server", diagnosing.app),
    ("Prometheus and Grafana", monitoring.app),
):
    for command in part.registered_commands:
        command.rich_help_panel = panel
        app.registered_commands.append(command)


def _play(request: RunRequest, continuing: str = "RESUME=1") -> RunFolder:
    """Run a lab with its progress on the terminal, and print what it measured.

    `continuing` is what a reader who stops it is told to call to go on.
    """
    with ConsoleProgress() as progress:
        try:
            folder = run_lab(request, progress)
        except (KeyboardInterrupt, SystemExit, OSError):
            progress.message(
                f"Stopping: finished trials are kept, and {continuing} continues from there"
            )
            raise
    summary = folder.summary()
    progress.show(report.digest(report.Facts.of(folder)))
    if request.clock.bounded:
        console.print(f"\nRecorded in [bold]{shown_path(folder.path)}[/]: `make report` tells it")
    else:
        console.print(f"\nReport: [bold]{shown_path(folder.path / 'report.md')}[/]")
        console.print("[dim]Open report.html beside it in a browser to see every request.[/]")
    if summary.failed:
        console.print(
            f"Trials that failed: {len(summary.failed)}; the finished ones are kept. The first"
            f" failed with: {escape(next(iter(summary.failed.values())))}"
        )
    return folder


THE_SAME_CALL = "the same call (without FRESH=1)"


def _play_or_begin_anew(request: RunRequest) -> RunFolder:
    """Run a lab; begin it anew where its unfinished run cannot be continued."""
    try:
        return _play(request, THE_SAME_CALL)
    except CannotResume as reason:
        console.print(f"{escape(str(reason))}. It is started anew.")
        return _play(replace(request, resume=False), THE_SAME_CALL)


def _say(text: str) -> None:
    """Print a line in which nothing is taken for markup."""
    console.print(escape(text))


def _lab(name: str) -> Lab:
    if name not in LABS:
        raise LabError(f"there is no lab {name!r}{did_you_mean(name, LABS)} are {', '.join(LABS)}")
    return LABS[name]


def _command_words(command: str) -> list[str]:
    """Split ENGINE_COMMAND into words; raises LabError where it names no program."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise LabError(f"ENGINE_COMMAND={masked(command)}: {error}") from error
    if words and shutil.which(words[0]) is None:
        raise LabError(
            f"ENGINE_COMMAND: there is no program {masked(words[0])}: install it, or correct the"
            " name"
        )
    return words


def _changes(text: str, seed: str = "") -> dict[str, Any]:
    """Read SET and SEED; raises LabError for a secret, which would be recorded with the run."""
    if holds_secret(text):
        raise LabError(
            f"SET={masked(text)} holds what looks like a secret, and a run's settings are recorded:"
            " pass it to the program that needs it in an environment variable instead"
        )
    return parse_changes(f"{text} seed={seed}" if seed else text)


def _parallel(tp: int, dp: int, pp: int) -> dict[str, int]:
    """Write TP, DP and PP as changes of a lab's flags, with which a run is marked."""
    sizes = {"tensor": tp, "data": dp, "pipeline": pp}
    return {f"flags.{way}-parallel-size": n for way, n in sizes.items() if n > 1}


def _objective(slo: str) -> dict[str, float]:
    """Write SLO as changes of a lab; raises LabError."""
    limits_s = slo_of(slo).by_name() if slo else {}
    return {f"slo.{name}_s": limit_s for name, limit_s in limits_s.items()}


if __name__ == "__main__":
    app()
