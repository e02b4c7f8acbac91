"""The commands about what is watched: Prometheus between runs, dashboards, Grafana."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from dashboards import boards, live, prometheus, stack
from dashboards.stack import Stack
from labs import LABS
from labs.commands.terminal import console, plainly
from labs.filing.results import RESULTS, RunFolder, all_runs, open_run
from labs.judging.metrics import METRICS
from labs.lab import LabError
from labs.running import backfill
from labs.running.run import run_lock
from serving import machine
from serving.ports import require_port

app = typer.Typer()
WATCH_PORT, GRAFANA_PORT = 9090, 3000


@app.command()
def watch(
    port: Annotated[int, typer.Option(envvar="LABS_PORT", min=1, max=65535)] = WATCH_PORT,
) -> None:
    """Start a Prometheus that stays up between labs, with a page that draws what it sees."""
    with plainly():
        found = prometheus.watching()
        if found is None:
            require_port(port, "PORT")
            found = live.start(port, RESULTS)
        console.print(f"Watching: [bold]{found.page_url}[/]")
        ends = "watch-stop" if found.own else "stack-stop"
        console.print(f"Labs record there from now on; `make {ends}` ends it.")


@app.command("watch-stop")
def watch_stop() -> None:
    """End the Prometheus that `watch` started; its data stay."""
    with plainly():
        if (found := prometheus.watching()) and not found.own:
            raise LabError("this one runs in a container: `make stack-stop` ends it, and Grafana")
        console.print("Stopped." if prometheus.unwatch() else "None was up.")


@app.command("import")
def import_runs(
    runs: Annotated[
        list[str] | None,
        typer.Argument(envvar="LABS_RUN", help="Runs' folders; default: every run."),
    ] = None,
) -> None:
    """Load finished runs into Prometheus at their own times; what is there already stays."""
    with plainly(), run_lock():
        folders = [open_run(Path(run)) for run in runs or ()] or all_runs()
        backfill.load(folders, _tell)
        if folders and prometheus.watching() is None:
            console.print("`make watch` shows them.")


@app.command()
def dashboards() -> None:
    """Write the Grafana dashboards anew from their code."""
    with plainly():
        variants = [[v.name for v in lab.variants] for lab in LABS.values()]
        for path in boards.write(variants, METRICS):
            console.print(os.path.relpath(path), soft_wrap=True)


@app.command("stack")
def start_stack(
    grafana_port: Annotated[
        int, typer.Option(envvar="LABS_GRAFANA_PORT", min=1, max=65535)
    ] = GRAFANA_PORT,
    prometheus_port: Annotated[
        int, typer.Option(envvar="LABS_PROMETHEUS_PORT", min=1, max=65535)
    ] = WATCH_PORT,
) -> None:
    """Start Prometheus and Grafana in containers, with the lab's dashboards in place."""
    with plainly():
        found = Stack(grafana_port, prometheus_port, gpu=machine.detect().kind == "gpu")
        console.print("Starting the containers; the first time docker downloads their images.")
        found.start()
        secret = "GRAFANA_PASSWORD"
        if not os.environ.get(secret):
            secret = f"in {os.path.relpath(stack.PASSWORD_FILE)}"
        console.print(f"Grafana: [bold]{found.url}[/] (user admin, password {secret})")
        console.print("Labs record there from now on; `make stack-stop` ends it.")


@app.command("stack-stop")
def stop_stack() -> None:
    """End the containers that `stack` started; the data stay."""
    with plainly():
        Stack(GRAFANA_PORT, WATCH_PORT).stop()
        console.print("Stopped.")


@app.command("grafana-push")
def grafana_push(
    url: Annotated[
        str, typer.Option(envvar="LABS_GRAFANA_URL", help="The Grafana, such as http://host:3000.")
    ],
    prometheus_url: Annotated[
        str,
        typer.Option(
            envvar="LABS_PROMETHEUS_URL", help="The Prometheus, as that Grafana reaches it."
        ),
    ] = f"http://127.0.0.1:{WATCH_PORT}",
) -> None:
    """Put the dashboards, their data source and the runs on file on a Grafana that is there.

    The token of a service account is read from GRAFANA_TOKEN.
    """
    with plainly():
        try:
            from dashboards import push
            from labs.commands.annotations import regions
        except ImportError as error:  # a bundle leaves its client out
            raise LabError(
                f"{error.name} is not installed here, so push from where the lab was set up"
            ) from error
        found = regions(all_runs(), _tell)
        try:
            push.push(url, os.environ.get("GRAFANA_TOKEN", ""), prometheus_url, found)
        except push.GrafanaError as error:
            raise LabError(str(error)) from error
        console.print(f"There: {len(boards.BOARDS)} dashboards and {len(found)} runs at {url}")


def _tell(folder: RunFolder, what: str) -> None:
    console.print(f"{os.path.relpath(folder.path)}: {escape(what)}", soft_wrap=True)
