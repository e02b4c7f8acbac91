"""The command `diagnose`: what do the metrics of a running server point to?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from labs.harness.commands.options import ReplicasOption, addresses
from labs.harness.commands.terminal import (
    ConsoleProgress,
    console,
    reported_errors,
    show,
    shown_path,
)
from labs.harness.judging.diagnosis import TooLittle, diagnose
from labs.harness.running import diagnosing
from labs.harness.running.diagnosing import ReadingFile
from labs.harness.running.recorded_metrics import moment, read_between
from labs.harness.spec import LabError
from labs.harness.telling import diagnoses
from serving.engines.endpoint import Endpoint

app = typer.Typer()
SECONDS = 30.0


PrometheusOption = Annotated[
    str,
    typer.Option(
        envvar="LABS_PROMETHEUS_URL",
        help="A Prometheus that scraped the server, instead of ENDPOINT: http://host:9090.",
    ),
]
StartOption = Annotated[
    str,
    typer.Option("--from", envvar="LABS_FROM", help="With it: from this time, 2026-11-28T10:15."),
]
EndOption = Annotated[
    str, typer.Option("--to", envvar="LABS_TO", help="To this time; both may have a zone.")
]
RecordedModelOption = Annotated[
    str, typer.Option(envvar="LABS_MODEL", help="The model, where it recorded several.")
]
BaselineOption = Annotated[
    Path | None,
    typer.Option(
        envvar="LABS_BASELINE",
        help="A reading of the same server while it was well, which --out wrote.",
    ),
]
ReadingOut = Annotated[
    Path | None,
    typer.Option(envvar="LABS_OUT", help="Keep this reading in a file, to compare later ones."),
]


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
    prometheus_url: PrometheusOption = "",
    start: StartOption = "",
    end: EndOption = "",
    model: RecordedModelOption = "",
    baseline: BaselineOption = None,
    out: ReadingOut = None,
) -> None:
    """Read a server's metrics twice, and name the cause of worse latency that they point to.

    No load is sent: the server is observed with its own. Both readings may also be those of two
    past times, from a Prometheus. Beside a reading of when it was well every cause of the rule can
    be told; without one, those that have a threshold of their own.
    """
    with reported_errors():
        if bool(endpoint) == bool(prometheus_url):
            raise LabError("give either ENDPOINT=, a running server, or PROMETHEUS_URL=")
        healthy = diagnosing.kept(baseline) if baseline else None
        if prometheus_url:
            if endpoint_metrics:
                raise LabError("ENDPOINT_METRICS= goes with ENDPOINT=, not with PROMETHEUS_URL=")
            times = moment(start, "FROM"), moment(end, "TO")
            served, reading = read_between(prometheus_url, *times, model)
            seconds, more = (times[1] - times[0]).total_seconds(), "give times further apart"
            _require_same_model(healthy, served)
        else:
            if start or end or model:
                raise LabError("FROM=, TO= and MODEL= go with PROMETHEUS_URL=, not with ENDPOINT=")
            server = Endpoint(endpoint, addresses(endpoint_metrics))
            served, more = server.model, f"observe for longer (SECONDS={10 * seconds:.0f})"
            _require_same_model(healthy, served)
            with ConsoleProgress() as progress:
                reading = diagnosing.read_over(server, seconds, progress.waiting)
        if out:
            diagnosing.keep(out, served, seconds, reading)
            console.print(f"This reading: [bold]{shown_path(out)}[/]", soft_wrap=True)
        reference = healthy.reading if healthy else None
        try:
            diagnosis = diagnose(reading, reference)
        except TooLittle as reason:
            raise LabError(f"{reason}: {more}, while the server is in use") from reason
        show(diagnoses.page(served, seconds, reading, reference, diagnosis))


def _require_same_model(healthy: ReadingFile | None, served: str) -> None:
    if healthy and healthy.model != served:
        raise LabError(
            f"BASELINE is a reading of {healthy.model}, and this server serves {served}: give one"
            " of the same model"
        )
