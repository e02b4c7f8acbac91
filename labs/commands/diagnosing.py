"""The command `diagnose`: what do the metrics of a running server point to?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from labs.commands.options import ReplicasOption, addresses
from labs.commands.terminal import ConsoleProgress, console, reported_errors, show
from labs.judging.diagnosis import TooLittle, diagnose
from labs.lab import LabError
from labs.running import diagnosing
from labs.running.diagnosing import ReadingFile
from labs.running.recorded_metrics import moment, read_between
from labs.telling import diagnoses
from serving.engines.endpoint import Endpoint

app = typer.Typer()
SECONDS = 30.0


@app.command("diagnose")
def diagnose_endpoint(
    endpoint: Annotated[
        str, typer.Option(envvar="LABS_ENDPOINT", help="The running server: http://host:8000.")
    ] = "",
    endpoint_metrics: ReplicasOption = "",
    seconds: Annotated[
        float,
        typer.Option(
            envvar="LABS_SECONDS", min=1, max=3600, help="How long its metrics are observed."
        ),
    ] = SECONDS,
    prometheus_url: Annotated[
        str,
        typer.Option(
            envvar="LABS_PROMETHEUS_URL",
            help="A Prometheus that scraped the server, instead of ENDPOINT: http://host:9090.",
        ),
    ] = "",
    start: Annotated[
        str,
        typer.Option(
            "--from",
            envvar="LABS_FROM",
            help="Read what it recorded from this time: 2026-11-28T10:15.",
        ),
    ] = "",
    end: Annotated[
        str, typer.Option("--to", envvar="LABS_TO", help="To this time; both may have a zone.")
    ] = "",
    model: Annotated[
        str,
        typer.Option(
            envvar="LABS_MODEL", help="With PROMETHEUS_URL: the model, where it knows several."
        ),
    ] = "",
    baseline: Annotated[
        Path | None,
        typer.Option(
            envvar="LABS_BASELINE",
            help="A reading of the same server while it was well, which --out wrote.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(envvar="LABS_OUT", help="Keep this reading in a file, to compare later ones."),
    ] = None,
) -> None:
    """Read a server's metrics twice, and name the cause of worse latency that they point to.

    No load is sent: the server is observed with its own. Both readings may also be those of two
    past times, from a Prometheus. Beside a reading of when it was well every
    cause of the rule can be told; without one, those that have a threshold of their own.
    """
    with reported_errors():
        healthy = diagnosing.kept(baseline) if baseline else None
        if bool(endpoint) == bool(prometheus_url):
            raise LabError("give either ENDPOINT=, a running server, or PROMETHEUS_URL=")
        if prometheus_url:
            times = [moment(start, "FROM"), moment(end, "TO")]
            seconds = (times[1] - times[0]).total_seconds()
            served, now = read_between(prometheus_url, times[0], times[1], model)
            _require_same_model(healthy, served)
        else:
            server = Endpoint(endpoint, addresses(endpoint_metrics))
            served = server.model
            _require_same_model(healthy, served)
            with ConsoleProgress() as progress:
                now = diagnosing.read_over(server, seconds, progress.waiting)
        if out:
            diagnosing.keep(out, served, seconds, now)
            console.print(f"This reading: [bold]{os.path.relpath(out)}[/]", soft_wrap=True)
        reference = healthy.reading if healthy else None
        try:
            found = diagnose(now, reference)
        except TooLittle as reason:
            longer = (
                "give times further apart"
                if prometheus_url
                else (f"observe for longer (SECONDS={10 * seconds:.0f})")
            )
            raise LabError(f"{reason}: {longer}, while the server is in use") from reason
        show(diagnoses.page(served, seconds, now, reference, found))


def _require_same_model(healthy: ReadingFile | None, served: str) -> None:
    if healthy and healthy.model != served:
        raise LabError(
            f"BASELINE is a reading of {healthy.model}, and this server serves {served}: give one"
            " of the same model"
        )
