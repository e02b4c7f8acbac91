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
from labs.telling import diagnoses
from serving.engines.endpoint import Endpoint

app = typer.Typer()
SECONDS = 30.0


@app.command("diagnose")
def diagnose_endpoint(
    endpoint: Annotated[
        str, typer.Option(envvar="LABS_ENDPOINT", help="The running server: http://host:8000.")
    ],
    endpoint_metrics: ReplicasOption = "",
    seconds: Annotated[
        float,
        typer.Option(
            envvar="LABS_SECONDS", min=1, max=3600, help="How long its metrics are observed."
        ),
    ] = SECONDS,
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

    No load is sent: the server is observed with its own. Beside a reading of when it was well every
    cause of the rule can be told; without one, those that have a threshold of their own.
    """
    with reported_errors():
        healthy = diagnosing.kept(baseline) if baseline else None
        server = Endpoint(endpoint, addresses(endpoint_metrics))
        if healthy and healthy.model != server.model:
            raise LabError(
                f"BASELINE is a reading of {healthy.model}, and this server serves {server.model}:"
                " give one of the same model"
            )
        with ConsoleProgress() as progress:
            now = diagnosing.read_over(server, seconds, progress.waiting)
        if out:
            diagnosing.keep(out, server, seconds, now)
            console.print(f"This reading: [bold]{os.path.relpath(out)}[/]", soft_wrap=True)
        reference = healthy.reading if healthy else None
        try:
            diagnosis = diagnose(now, reference)
        except TooLittle as reason:
            raise LabError(
                f"{reason}: observe for longer (SECONDS={10 * seconds:.0f}), while the server is in"
                " use"
            ) from reason
        show(diagnoses.page(server.model, seconds, now, reference, diagnosis))
