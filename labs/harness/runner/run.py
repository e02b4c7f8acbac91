"""Run a lab, from its question to its report: `run()` reads in the order of events."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from dashboards import live
from dashboards.prometheus import PrometheusError
from labs.harness.analysis.checks.expected import Served
from labs.harness.analysis.computed import PointForecasts, Predictions
from labs.harness.derived.design import played_s, took_turns
from labs.harness.derived.lab_modules import before_engines
from labs.harness.derived.summarize import summarise
from labs.harness.forecast.forecast import (
    FleetForecasts,
    FleetSize,
    forecast,
    forecast_fleets,
    require_open_loads,
    write_lengths,
)
from labs.harness.forecast.forecaster import ForecastError
from labs.harness.plan.progress import ProgressDisplay
from labs.harness.plan.resolve import (
    RunRequest,
    Setup,
    engine_environment,
    requests_file,
    resolve,
    scale_of,
)
from labs.harness.reports import pages, report, tables
from labs.harness.reports.forecasts import on_two_engines
from labs.harness.runner import backfill, engine_series
from labs.harness.runner.engines import resident_groups
from labs.harness.runner.harness import Harness, open_harness
from labs.harness.runner.resume import unfinished
from labs.harness.runner.trials import write_requests
from labs.harness.spec.lab import LabError
from labs.harness.spec.names import PairName
from labs.harness.storage import packing
from labs.harness.storage.recorded import Run, Session
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import run_id, write_json
from loadtests.plan import sent_sha256
from loadtests.trace import MOST_ROWS
from serving import atomic
from serving.engines import ENGINES
from serving.models import catalog
from serving.packaging.install import scratch_of
from serving.processes.masking import recordable

PROMPTS_TOOK = "Writing the prompts took {} s"  # said where a call is bounded
# What a run needs on disk while it lasts, and the lock that keeps a second one out.
SCRATCH = scratch_of(catalog.ROOT)
AMPLE = 0.5  # of the KV cache: where no point uses so much of it, its use decides nothing


def run(request: RunRequest, progress: ProgressDisplay) -> RunFolder:
    """Run a lab; raises LabError, EngineError or ModelError with one sentence that says what to do.

    Returns the folder; its `complete` is false when a trial failed. Ctrl-C leaves what was finished
    for `resume`.
    """
    began = time.monotonic()
    with contextlib.ExitStack() as exits:
        exits.enter_context(run_lock())
        setup = resolve(request, progress)
        work = exits.enter_context(_scratch())
        writing = time.monotonic()
        prompts_sha256 = sent_sha256(write_requests(setup, work, progress))
        if setup.clock.bounded:
            progress.message(PROMPTS_TOOK.format(f"{time.monotonic() - writing:.1f}"))
        manifest = _manifest(setup, request, prompts_sha256)
        folder = unfinished(manifest) if request.resume else None
        if request.resume and folder is None:
            progress.message(
                "Nothing to resume: no unfinished run has these settings, so a new one starts"
            )
        folder = folder or RunFolder.create(manifest)
        if manifest.endpoint_metrics is False:
            progress.message(
                "This endpoint shows no metrics: nothing is proved from the engine's side"
            )
        _write_and_show_predictions(setup, folder, work, progress)
        before_engines(setup.lab.name)(setup, folder, progress)
        session = _measure(setup, folder, work, progress, began)
        write_json(folder.path / "session.json", session)
        _finish(folder, session, progress, reports=not setup.clock.bounded)
    return folder


@contextlib.contextmanager
def unfiled(request: RunRequest, progress: ProgressDisplay) -> Iterator[Harness]:
    """Have a lab's instruments ready for trials that nobody forecasts, judges or files.

    They are gone, with all engines, when the block ends. Raises what `run` raises.
    """
    with run_lock(), _scratch() as work:
        setup = replace(resolve(request, progress), keep_disturbed=True, blind=True)
        folder = RunFolder.create(_manifest(setup, request, sent_sha256([])), work / "trials")
        write_json(folder.path / "predictions.json", Predictions(effects={}, forecasts={}))
        variants = [*setup.lab.variants]
        with open_harness(setup, folder, work, progress, [variants]) as harness:
            yield harness


def _write_and_show_predictions(
    setup: Setup, folder: RunFolder, work: Path, progress: ProgressDisplay
) -> None:
    """Write the predictions before any engine starts; those of a resumed run stay as they are."""
    if folder.is_predicted:
        predictions = folder.predictions()
    else:
        predictions = predict(setup, in_virtual_time(setup, work, progress))
        write_json(folder.path / "predictions.json", predictions)
    forecasts = predictions.in_virtual_time
    if os.environ.get("LABS_VERBOSE"):
        predicted = report.predicted(
            setup.lab,
            predictions,
            [
                tables.in_virtual_time(setup.lab, _for_terminal(forecasts)) if forecasts else None,
                tables.searched(forecasts) if forecasts else None,
                on_two_engines(setup.lab, forecasts) if forecasts else None,
                tables.predictions(setup.lab, predictions),
            ],
        )
    else:
        predicted = report.predicted_in_brief(setup.lab, predictions)
    if predicted:
        progress.show(predicted)


def _for_terminal(forecasts: PointForecasts) -> PointForecasts:
    """Leave out the use of the KV cache where memory is ample: the report has it in any case."""
    if any(use.peak >= AMPLE for use in forecasts.kv_use.values()):
        return forecasts
    return forecasts.model_copy(update={"kv_use": {}})


def _measure(
    setup: Setup, folder: RunFolder, work: Path, progress: ProgressDisplay, began: float
) -> Session:
    """Play every trial, the engines taking turns where they must; return how the sitting went.

    `began` is the run's start on the monotonic clock. Raises EngineError where no engine starts.
    """
    lab = setup.lab
    groups = resident_groups(setup, took_turns(folder, setup.points, lab))
    until = time.monotonic() + lab.most_s - played_s(folder, setup.points, lab)
    setup.clock.preparations_s.append(round(time.monotonic() - began, 1))
    with open_harness(setup, folder, work, progress, groups) as harness:
        trips = harness.play_lab()
        harness.repeat_undecided(until)
        agreement = harness.counts.agreement(harness.prometheus)
        engine_series.keep(folder, setup.points, setup.lab, harness.prometheus)
    return Session(
        engine_start_s=round(harness.engines.start_s, 2),
        load_s=round(harness.trials.load_s, 2),
        wall_s=round(time.monotonic() - began, 2),
        resident=len(harness.groups) == 1,
        there_and_back=len(harness.groups) > 1 and trips > 1,
        idle_suspended=len(harness.groups) == 1 < len(lab.variants) and harness.engines.share_cpu,
        client_first=harness.engines.share_cpu,
        agreement=agreement,
        prometheus=harness.prometheus.missing,
        ended_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _finish(folder: RunFolder, session: Session, progress: ProgressDisplay, reports: bool) -> None:
    """Judge and report what was measured; write COMPLETE last, where no trial is missing.

    Without `reports` the pages and packing are left to `make report`: where time is short, they can
    wait.
    """
    summary = summarise(folder)
    if reports:
        figures = report.draw(folder)
        report.write(folder, figures)
        pages.write(folder, figures)
    try:
        live.publish(folder.path)
        if not session.prometheus:
            backfill.load_figures(folder)
    except (PrometheusError, OSError) as error:  # the run itself is whole
        progress.message(f"{error}; `make import RUN={folder.path}` tries again")
    if not summary.failed and not summary.missing:
        atomic.write(folder.path / "COMPLETE", datetime.now(UTC).isoformat() + "\n")
        if reports:
            _pack(folder, progress)


def _pack(folder: RunFolder, progress: ProgressDisplay) -> None:
    """Pack a complete run; where that fails or is stopped, it stays as it is."""
    try:
        packing.pack(folder)
    except (LabError, OSError, ValueError, KeyError, TypeError, MemoryError) as error:
        progress.message(f"The run is complete, but was not packed: {error}; `make report` does it")
    except KeyboardInterrupt:
        progress.message("The run is complete, but was not packed: `make report` does it")


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """Make a folder for what a run needs on disk; it is removed when the block ends."""
    for left in SCRATCH.glob("run-*/"):  # by a run that was killed: no other holds the lock
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=SCRATCH, prefix="run-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def _scratch_locked() -> Iterator[Path]:
    """Make such a folder while no other run holds the lock; raises LabError where one does."""
    with run_lock(), _scratch() as work:
        yield work


@contextlib.contextmanager
def _scratch_beside_a_run() -> Iterator[Path]:
    """Make such a folder for what may go on beside a run, whose own is left alone."""
    with tempfile.TemporaryDirectory(prefix="lab-forecast-") as folder:
        yield Path(folder)


def _manifest(setup: Setup, request: RunRequest, prompts_sha256: str) -> Run:
    lab = setup.lab
    model = "" if setup.endpoint else "<model>"
    return Run(
        run_id=run_id(lab.digest()),
        lab=lab.resolved(),
        digest=lab.digest(),
        scale=scale_of(request, setup.machine),
        quick=request.quick,
        changes={**request.changes, **request.translated},
        endpoint=request.endpoint or None,
        replicas=setup.endpoint.replicas if setup.endpoint else [],
        engine_command=recordable("\n".join(request.engine_command)).splitlines(),
        model=setup.model.name,
        dummy=setup.model.dummy,
        model_shape=vars(setup.model.shape),
        weights={name: vars(served.shape) for name, served in setup.weights.items()},
        about=dict(setup.points[0].about),
        machine=setup.machine,
        ceilings=setup.ceilings,
        environment=engine_environment(setup.machine.kind, setup.model, setup.lab),
        argv={
            v.name: [
                f"<{v.served}>" if v.served else model,
                *ENGINES[v.engine].flag_argv(lab.engine_flags_of(v)),
            ]
            for v in lab.variants
        },
        model_revision=catalog.revision(setup.model.path),
        model_files=catalog.file_hashes(setup.model.path),
        derived_sha256={name: catalog.files_sha256(path) for name, path in setup.places.items()},
        served=_served(setup),
        template_tokens=setup.writer.head_tokens,
        endpoint_metrics=None if setup.endpoint is None else bool(setup.endpoint.snapshot()),
        prompts_sha256=prompts_sha256,
        reproduces=request.reproduces,
        usd_per_hour=request.usd_per_hour,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def forecast_alone(request: RunRequest, progress: ProgressDisplay) -> tuple[Setup, Predictions]:
    """Predict a lab's points and claims without running it.

    For a machine that is not here one repeat is played, whose prompts are enough work, and a run
    that is under way is not disturbed by anything timed. Raises what `run` raises before its
    engines start, and ForecastError.
    """
    with _scratch_beside_a_run() if request.card else _scratch_locked() as work:
        setup = played = resolve(request, progress)
        if setup.elsewhere:
            played = replace(setup, lab=setup.lab.model_copy(update={"repeats": 1}))
        write_requests(played, work, progress)
        return setup, predict(played, forecast(played, _request_files(played, work), progress))


def forecast_fleets_alone(
    request: RunRequest, size: FleetSize, progress: ProgressDisplay
) -> tuple[Setup, FleetForecasts]:
    """Forecast a lab's engines, several of each behind a router, under its open loads.

    A long trace has no prompts, only lengths. Raises what `forecast_alone` raises.
    """
    with _scratch_beside_a_run() if request.card else _scratch_locked() as work:
        setup = resolve(request, progress)
        setup = replace(setup, lab=setup.lab.model_copy(update={"repeats": 1}))
        require_open_loads(setup)
        if len(request.trace) > MOST_ROWS:
            progress.waiting("writing the requests")
            write_lengths(setup, work)
        else:
            write_requests(setup, work, progress)
        files = _request_files(setup, work)
        return setup, forecast_fleets(setup, files, size, progress)


@contextlib.contextmanager
def run_lock() -> Iterator[None]:
    """Keep a second run out while the block lasts, as each would measure the other.

    Raises LabError where another run holds the lock.
    """
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with (SCRATCH / "run.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LabError(
                "another lab is running from this checkout, and each would disturb the other: wait"
                " until it has ended, or stop it with Ctrl-C"
            ) from error
        yield


def _served(setup: Setup) -> dict[str, Served]:
    """Describe the weights that each variant's engine must say it loaded, where it can say so."""
    if setup.endpoint:
        return {}
    loaded = {
        v.name: setup.weights.get(v.name, setup.model).path
        for v in setup.lab.variants
        if ENGINES[v.engine].says_what_it_serves
    }
    return {
        name: Served(
            files_sha256=catalog.files_sha256(folder),
            quantized=catalog.is_quantized(folder),
            random=setup.model.dummy,
        )
        for name, folder in loaded.items()
    }


def in_virtual_time(setup: Setup, work: Path, progress: ProgressDisplay) -> PointForecasts | None:
    """Forecast every point; show why and return None where vLLM's scheduler cannot be driven."""
    try:
        return forecast(setup, _request_files(setup, work), progress)
    except ForecastError as error:
        progress.message(f"No forecast: {error}; the run continues with the closed formulas alone")
        return None


def _request_files(setup: Setup, work: Path) -> dict[str, list[Path]]:
    """Return the files of what each workload sends, repeat by repeat."""
    repeats = range(1, setup.lab.repeats + 1)
    return {w.name: [requests_file(work, w, r) for r in repeats] for w in setup.lab.workloads}


def predict(setup: Setup, forecasts: PointForecasts | None) -> Predictions:
    """Predict every claim and forecast of the lab, before any engine starts.

    A claim is predicted by the ratio of its two points' forecasts where both have one; the lab's
    closed form then stands beside it as an explanation. Elsewhere it is the prediction.
    """
    lab, points = setup.lab, setup.points
    closed = {
        c.name: {str(PairName(t.key, b.key)): c.predict(t, b) for t, b in lab.pairs(c, points)}
        for c in lab.claims
    }
    return Predictions(
        effects={
            c.name: {
                pair: (forecasts and forecasts.ratio(c.metric, PairName.parse(pair))) or by_formula
                for pair, by_formula in closed[c.name].items()
            }
            for c in lab.claims
        },
        closed_forms=closed if forecasts and forecasts.points else {},
        in_virtual_time=forecasts,
        acceptance={
            p.key: lab.acceptance(p)
            for p in points
            if lab.acceptance
            and p.flags.speculative_config
            and not (forecasts and p.key in forecasts.copied)
        },
        arithmetic=lab.arithmetic(lab, points[0]) if lab.arithmetic else {},
        forecasts={
            f.name: {p.key: f.predict(p) for p in points if f.arm.matches(p)} for f in lab.forecasts
        },
    )
