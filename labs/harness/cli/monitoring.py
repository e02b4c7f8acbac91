"""The commands about Prometheus between runs, dashboards and Grafana."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rich.markup import escape

from dashboards import boards, live, prometheus, stack
from dashboards.prometheus import WATCH_PORT
from dashboards.stack import Stack
from labs.harness.cli.options import command
from labs.harness.cli.terminal import console, shown_path
from labs.harness.reports import pages
from labs.harness.runner import backfill
from labs.harness.runner.run import run_lock
from labs.harness.spec.lab import LabError
from labs.harness.storage.results import RESULTS, RunFolder, all_runs, open_run
from serving.places import how_to_install
from serving.processes.ports import require_port

PANEL = "Prometheus and Grafana"
GRAFANA_PORT = 3000


@command("watch", panel=PANEL)
def watch(port: int = WATCH_PORT) -> None:
    """Start a Prometheus that stays up between labs, with a live page of its data."""
    watching = prometheus.watching()
    if watching is None:
        require_port(port, "PORT")
        watching = live.start(port, RESULTS, pages.script_hashes())
    console.print(f"Watching: [bold]{watching.page_url}[/]")
    console.print("Labs record into it from now on; `make stop` stops it.")


@command("stop", panel=PANEL)
def stop() -> None:
    """Stop the Prometheus of `watch`, or the containers of `stack`; their data are kept."""
    watching = prometheus.watching()
    if watching and watching.own:
        prometheus.unwatch()
    elif watching or shutil.which("docker"):  # Grafana may be up where Prometheus has ended
        Stack(GRAFANA_PORT, WATCH_PORT).stop()
    else:
        console.print("No Prometheus was running.")
        return
    console.print("Stopped.")


@command("import", panel=PANEL, behind="run")
def import_runs(run: list[str] | None = None) -> None:
    """Load finished runs into Prometheus at the times when they ran; its other data are kept."""
    with run_lock():
        folders = [open_run(Path(name)) for name in run or ()] or all_runs()
        backfill.load(folders, _print_about)
        if folders and prometheus.watching() is None:
            console.print("`make watch` starts a page that shows them.")


@command("stack", panel=PANEL)
def start_stack(
    grafana_port: int = GRAFANA_PORT,
    prometheus_port: int = WATCH_PORT,
) -> None:
    """Start Prometheus and Grafana in containers, with the lab's dashboards in place."""
    containers = Stack(grafana_port, prometheus_port)
    console.print("Starting the containers; the first time docker downloads their images.")
    containers.start()
    secret = "GRAFANA_PASSWORD"
    if not os.environ.get(secret):
        secret = f"in {os.path.relpath(stack.PASSWORD_FILE)}"
    console.print(f"Grafana: [bold]{containers.url}[/] (user admin, password {secret})")
    console.print("Labs record into it from now on; `make stop` stops it.")


@command("grafana-push", panel=PANEL)
def grafana_push(
    grafana_url: str,
    prometheus_url: str = f"http://127.0.0.1:{WATCH_PORT}",
) -> None:
    """Send the dashboards, their data source and the recorded runs to a running Grafana.

    GRAFANA_TOKEN holds the token of a service account.
    """
    try:
        from dashboards import push
        from labs.harness.cli.annotations import regions
    except ImportError as error:  # a bundle does not carry its client
        raise LabError(
            f"{error.name} is not installed here: {how_to_install('grafana')}"
        ) from error
    runs = regions(all_runs(), _print_about)
    try:
        push.push(grafana_url, os.environ.get("GRAFANA_TOKEN", ""), prometheus_url, runs)
    except push.GrafanaError as error:
        raise LabError(str(error)) from error
    console.print(f"{len(boards.BOARDS)} dashboards and {len(runs)} runs are at {grafana_url}")


def _print_about(folder: RunFolder, what: str) -> None:
    console.print(f"{shown_path(folder.path)}: {escape(what)}", soft_wrap=True)
