"""The command line: `labs --help`. The Makefile's targets set up first, then call it.

A setting behind a target (`make lab-x QUICK=1`) comes in the environment, under one prefix:
LABS_QUICK. Here are the commands that run something; the modules that are imported last have the
others.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from labs import LABS
from labs.harness.cli import doctor
from labs.harness.cli.options import (
    PORT,
    addresses,
    app,
    changes_of,
    command,
    command_words,
    lab_named,
    price_of,
    require_clone,
    require_known,
)
from labs.harness.cli.run_lab import play
from labs.harness.cli.settings import unread
from labs.harness.cli.terminal import console, errors, say, shown_path
from labs.harness.plan import derived_models
from labs.harness.plan.resolve import (
    RunRequest,
    is_dummy,
    model_for,
    model_of,
    require_devices,
    require_harmless,
)
from labs.harness.spec.lab import Lab, LabError, Variant
from labs.harness.spec.questions import QUESTIONS
from labs.harness.storage.results import RESULTS
from serving import bundle
from serving.engines import ENGINES
from serving.engines.flags import with_places
from serving.engines.vllm import Vllm
from serving.hardware import machine
from serving.models import catalog
from serving.processes.ports import require_port

HOME = typer.Option(help="The folder of results, models and caches.")
RUNS = typer.Option(help="The folder of recorded runs, such as a clone's `results`.")


@app.callback(
    help="Ask a question about LLM inference serving; answer it by measuring this machine."
)
def before_every_command(
    home: Annotated[str, HOME] = str(catalog.ROOT),
    results: Annotated[str, RUNS] = str(RESULTS),
) -> None:
    """Warn of variables with the prefix of settings that nothing reads.

    Both folders were taken off the command line before this module was imported.
    """
    for sentence in unread(os.environ):
        errors.print(f"[bold yellow]warning:[/] {escape(sentence)}")


LAB_NAME = typer.Argument(help="A lab's name; `labs list` names them all.")


@command("run", "lab-<name>", needs_vllm=True)
def run(
    lab: Annotated[str, LAB_NAME],
    quick: bool = False,
    aa: bool = False,
    set_: str = "",
    model: str = "",
    weights: str = "",
    tp: int = 1,
    endpoint: str = "",
    endpoint_metrics: str = "",
    seed: str = "",
    resume: bool = False,
    engine_command: str = "",
    price_per_hour: float = 0.0,
    unsafe_flags: bool = False,
) -> None:
    """Run a lab: predict, measure, judge, report.

    `make lab-<name> VLLM=0.31.0` runs it with another vLLM, in an environment of its own.
    DISTURBED=, RESULTS= and SCRATCH= are settings of make: docs/knobs.md explains them.
    """
    request = RunRequest(
        lab=lab_named(lab),
        quick=quick,
        aa=aa,
        changes=changes_of(set_, tp, seed),
        model=model,
        weights=weights,
        endpoint=endpoint,
        replicas=addresses(endpoint_metrics),
        resume=resume,
        engine_command=command_words(engine_command),
        usd_per_hour=price_of(price_per_hour),
        unsafe_flags=unsafe_flags,
    )
    if not play(request).complete:
        console.print("Some trials failed: RESUME=1 plays them again.")
        raise typer.Exit(1)


@command("list", "labs")
def list_labs() -> None:
    """List the labs and the questions each answers."""
    table = Table("Lab", "Question", "Answers", title="Labs", title_justify="left")
    for lab in LABS.values():
        answers = "\n".join(f"{i}  {QUESTIONS[i]}" for i in lab.answers)
        table.add_row(f"make lab-{lab.name}", lab.question, answers)
    console.print(table)


@command("derive", behind="name", needs_vllm=True)
def derive(
    name: str,
    model: str = "",
    weights: str = "",
    again: bool = False,
) -> None:
    """Make a model derived from the served one. A lab makes the models it needs by itself.

    What others have published in its place is downloaded, except with AGAIN=1. docs/knobs.md says
    what each NAME= makes.
    """
    require_known("NAME", name, tuple(derived_models.RECIPES))
    served = model_of(machine.detect(), model, weights)
    if again:
        shutil.rmtree(derived_models.place(served, name), ignore_errors=True)
    folder = derived_models.make(served, name, say, made_here=again)
    for key, value in derived_models.about(folder).items():
        console.print(f"  {key}: {escape(str(value))}", style="dim")
    console.print(f"The model is in [bold]{shown_path(folder)}[/]")


@command("serve", needs_vllm=True)
def serve(
    lab: str,
    variant: str = "",
    port: int = PORT,
    set_: str = "",
    model: str = "",
    weights: str = "",
    tp: int = 1,
    unsafe_flags: bool = False,
) -> None:
    """Start the engine of a lab's variant in the foreground; Ctrl-C ends it."""
    host = machine.detect()
    all_changes = changes_of(set_, tp)
    resolved = lab_named(lab).at(catalog.scale_of(host), False, all_changes, is_dummy(weights))
    if not unsafe_flags:
        require_harmless(resolved)
    require_devices(resolved, host)
    chosen = _variant_on_vllm(resolved, variant)
    flags, served = resolved.flags_of(chosen), model_for(resolved, host, model, weights)
    require_port(port, "PORT")
    Vllm.check_flags([flags])
    alone = resolved.model_copy(update={"variants": (chosen,), "studies": ()})
    places = {
        name: derived_models.make(served, name, say, made_here=alone.made_here)
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


@command("doctor")
def examine(
    model: str = "",
    weights: str = "",
) -> None:
    """Check what this machine has and lacks, how to mend it, and which labs can run."""
    checks, abilities = doctor.examine(model, weights)
    checks_table = Table("Part", "State", "What to do", title="This machine", title_justify="left")
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


@command("bundle")
def make_bundle(
    python_version: str = "3.12",
    have: Path | None = None,
    vllm: str = "",
    part: str = "1G",
    with_tree: str = "",
    lean: bool = False,
    out: Path = Path("bundle"),
) -> None:
    """Gather all that a GPU machine without internet needs, in parts with checksums."""
    require_clone("bundle")
    wanted = bundle.BundleRequest(
        python=python_version,
        have=bundle.read_have(have) if have else {},
        vllm=vllm,
        part_bytes=bundle.fitting(with_tree) if with_tree else bundle.part_size(part),
        lean=lean,
    )
    bundle.bundle(wanted, out.resolve(), say)


from labs.harness.cli import (  # noqa: E402, F401 - they add their commands to these
    all_labs,
    diagnosing,
    drilling,
    monitoring,
    planning,
    recorded_runs,
    reproducing,
)

__all__ = ["app"]
