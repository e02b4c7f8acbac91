"""The commands about Prometheus between runs, dashboards and Grafana."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from dashboards import boards, live, prometheus, stack
from dashboards.prometheus import WATCH_PORT
from dashboards.stack import Stack, StackError
from labs import LABS
from labs.harness.commands.terminal import console, reported_errors, show_path, shown_path
from labs.harness.filing.results import RESULTS, RunFolder, all_runs, open_run
from labs.harness.judging.metrics import METRICS
from labs.harness.running import backfill
from labs.harness.running.run import run_lock
from labs.harness.spec import LabError
from labs.harness.telling import pages
from serving.hardware import machine
from serving.processes.ports import require_port

app = typer.Typer()
GRAFANA_PORT = 3000


@app.command()
def watch(
    port: Annotated[
        int, typer.Option(envvar="LABS_PORT", min=1, max=65535, help="The port of Prometheus.")
    ] = WATCH_PORT,
) -> None:
    """Start a Prometheus that stays up between labs, with a live page of its data."""
    with reported_errors():
        watching = prometheus.watching()
        if watching is None:
            require_port(port, "PORT")
            watching = live.start(port, RESULTS, pages.script_hashes())
        console.print(f"Watching: [bold]{watching.page_url}[/]")
        ends = "watch-stop" if watching.own else "stack-stop"
        console.print(f"Labs record into it from now on; `make {ends}` stops it.")


@app.command("watch-stop")
def watch_stop() -> None:
    """Stop the Prometheus that `watch` started; its data are kept."""
    with reported_errors():
        if (watching := prometheus.watching()) and not watching.own:
            raise LabError(
                "this Prometheus runs in a container: `make stack-stop` stops it and Grafana"
            )
        console.print("Stopped." if prometheus.unwatch() else "No Prometheus was running.")


@app.command("import")
def import_runs(
    runs: Annotated[
        list[str] | None,
        typer.Argument(envvar="LABS_RUN", help="The folders of runs; default: every run."),
    ] = None,
) -> None:
    """Load finished runs into Prometheus at the times when they ran; its other data are kept."""
    with reported_errors(), run_lock():
        folders = [open_run(Path(run)) for run in runs or ()] or all_runs()
        backfill.load(folders, _print_about)
        if folders and prometheus.watching() is None:
            console.print("`make watch` starts a page that shows them.")


@app.command()
def dashboards() -> None:
    """Write the Grafana dashboards again from their code."""
    with reported_errors():
        variants = [[v.name for v in lab.variants] for lab in LABS.values()]
        for path in boards.write(variants, METRICS):
            show_path(path)


@app.command("stack")
def start_stack(
    grafana_port: Annotated[
        int,
        typer.Option(envvar="LABS_GRAFANA_PORT", min=1, max=65535, help="The port of Grafana."),
    ] = GRAFANA_PORT,
    prometheus_port: Annotated[
        int,
        typer.Option(
            envvar="LABS_PROMETHEUS_PORT", min=1, max=65535, help="The port of Prometheus."
        ),
    ] = WATCH_PORT,
    profiling: Annotated[
        bool,
        typer.Option(
            "--profiling",
            envvar="LABS_PROFILING",
            help="Also start NVIDIA's exporter, whose profiling counters need SYS_ADMIN.",
        ),
    ] = False,
) -> None:
    """Start Prometheus and Grafana in containers, with the lab's dashboards in place."""
    with reported_errors():
        gpu = machine.detect().kind == "gpu"
        if profiling and not gpu:
            raise StackError("PROFILING=1 needs an NVIDIA GPU, and there is none: leave it out")
        if gpu and not profiling:
            console.print("With PROFILING=1 NVIDIA's exporter starts too (it needs SYS_ADMIN).")
        containers = Stack(grafana_port, prometheus_port, profiling)
        console.print("Starting the containers; the first time docker downloads their images.")
        containers.start()
        secret = "GRAFANA_PASSWORD"
        if not os.environ.get(secret):
            secret = f"in {os.path.relpath(stack.PASSWORD_FILE)}"
        console.print(f"Grafana: [bold]{containers.url}[/] (user admin, password {secret})")
        console.print("Labs record into it from now on; `make stack-stop` stops it.")


@app.command("stack-stop")
def stop_stack() -> None:
    """Stop the containers that `stack` started; their data are kept."""
    with reported_errors():
        Stack(GRAFANA_PORT, WATCH_PORT).stop()
        console.print("Stopped.")


@app.command("grafana-push")
def grafana_push(
    url: Annotated[
        str,
        typer.Option(
            envvar="LABS_GRAFANA_URL", help="The address of the Grafana, such as http://host:3000."
        ),
    ],
    prometheus_url: Annotated[
        str,
        typer.Option(
            envvar="LABS_PROMETHEUS_URL",
            help="The address at which that Grafana reaches Prometheus.",
        ),
    ] = f"http://127.0.0.1:{WATCH_PORT}",
) -> None:
    """Send the dashboards, their data source and the recorded runs to a running Grafana.

    GRAFANA_TOKEN holds the token of a service account.
    """
    with reported_errors():
        try:
            from dashboards import push
            from labs.harness.commands.annotations import regions
        except ImportError as error:  # a bundle does not carry its client
            raise LabError(
                f"{error.name} is not installed here: push from a machine set up by `make setup`"
            ) from error
        runs = regions(all_runs(), _print_about)
        try:
            push.push(url, os.environ.get("GRAFANA_TOKEN", ""), prometheus_url, runs)
        except push.GrafanaError as error:
            raise LabError(str(error)) from error
        console.print(f"{len(boards.BOARDS)} dashboards and {len(runs)} runs are at {url}")


def _print_about(folder: RunFolder, what: str) -> None:
    console.print(f"{shown_path(folder.path)}: {escape(what)}", soft_wrap=True)
