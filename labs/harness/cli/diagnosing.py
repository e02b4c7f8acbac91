"""The command `diagnose`: what do the metrics of a running server point to?"""

from __future__ import annotations

from pathlib import Path

from labs.harness.analysis.diagnosis import TooLittle, diagnose
from labs.harness.cli.options import addresses, command
from labs.harness.cli.terminal import ConsoleProgress, console, show, shown_path
from labs.harness.reports import diagnoses
from labs.harness.runner import diagnosing
from labs.harness.runner.diagnosing import ReadingFile
from labs.harness.runner.recorded_metrics import moment, read_between
from labs.harness.spec.lab import LabError
from serving.engines.endpoint import Endpoint

SECONDS = 30.0


@command("diagnose", panel="A running server")
def diagnose_endpoint(
    endpoint: str = "",
    endpoint_metrics: str = "",
    seconds: float = SECONDS,
    prometheus_url: str = "",
    from_: str = "",
    to: str = "",
    model: str = "",
    baseline: Path | None = None,
    out: Path | None = None,
) -> None:
    """Read a server's metrics twice, and name the cause of worse latency that they point to.

    No load is sent: the server is observed with its own. Both readings may also be those of two
    past times, from a Prometheus. Beside a reading of when it was well every cause of the rule can
    be told; without one, those that have a threshold of their own.
    """
    if bool(endpoint) == bool(prometheus_url):
        raise LabError("give either ENDPOINT=, a running server, or PROMETHEUS_URL=")
    healthy = diagnosing.kept(baseline) if baseline else None
    if prometheus_url:
        if endpoint_metrics:
            raise LabError("ENDPOINT_METRICS= goes with ENDPOINT=, not with PROMETHEUS_URL=")
        times = moment(from_, "FROM"), moment(to, "TO")
        served, reading = read_between(prometheus_url, *times, model)
        seconds, more = (times[1] - times[0]).total_seconds(), "give times further apart"
        _require_same_model(healthy, served)
    else:
        if from_ or to or model:
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
