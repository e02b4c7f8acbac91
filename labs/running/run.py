"""A run, from a question to a report: `run()` reads top to bottom as what happens."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from dashboards.prometheus import PrometheusError
from labs.filing.results import (
    PointForecasts,
    Predictions,
    Run,
    RunFolder,
    Session,
    latest_run,
    run_id,
    write_json,
)
from labs.lab import LabError
from labs.running import backfill, harness
from labs.running.engines import in_turn, resident_groups
from labs.running.forecast import ForecastError, forecast, ratio_of_forecasts
from labs.running.resolve import Request, Setup, Teller, engine_environment, resolve
from labs.running.trials import interleave, requests_file, write_requests
from labs.telling import pages, report, tables
from labs.telling.document import bullets, section
from labs.telling.summary import summarise
from serving import models
from serving.engines import ENGINES

# What a run needs on disk while it lasts, and the lock that keeps a second one out.
SCRATCH = Path(os.environ.get("LABS_SCRATCH") or models.CACHE)


def run(request: Request, teller: Teller) -> RunFolder:
    """Run a lab; raises LabError, EngineError or ModelError with one sentence that says what to do.

    Returns the folder; its `complete` is false when a trial failed. Ctrl-C leaves what was finished
    for `resume`.
    """
    began = time.monotonic()
    with contextlib.ExitStack() as exits:
        exits.enter_context(alone())
        setup = resolve(request, teller)
        work = exits.enter_context(_scratch())
        teller.waiting("writing the prompts")
        prompts = write_requests(setup, work)
        folder = _resumed(setup) if request.resume else None
        if request.resume and folder is None:
            teller.step("Nothing to resume: no unfinished run of this lab as it is asked for now")
        folder = folder or RunFolder.create(_manifest(setup, request, prompts))
        if (folder.path / "predictions.json").exists():  # what was said before stays said
            predictions = folder.predictions()
        else:
            predictions = predict(setup, in_virtual_time(setup, work, teller))
            write_json(folder.path / "predictions.json", predictions)
        teller.show(
            section(
                "Predicted, before any engine starts",
                tables.in_virtual_time(setup.lab, predictions.in_virtual_time)
                if predictions.in_virtual_time
                else None,
                tables.predictions(setup.lab, predictions),
                bullets(report.formulas(setup.lab, predictions)),
            )
        )
        with harness.started(setup, folder, work, teller) as running:
            groups = resident_groups(setup)
            turns = in_turn(groups, setup.lab.repeats)
            for group, repeats in turns:
                trials = [(p, r) for p, r in interleave(setup, group) if r in repeats]
                running.visit(group, trials)
            running.settle(groups)
            agreement = running.counts.agreement(running.prometheus)
        write_json(
            folder.path / "session.json",
            Session(
                engine_start_s=round(running.engines.start_s, 2),
                load_s=round(running.trials.load_s, 2),
                wall_s=round(time.monotonic() - began, 2),
                resident=len(groups) == 1,
                there_and_back=len(turns) > len(groups),
                agreement=agreement,
                prometheus=running.prometheus.missing,
                ended_at=datetime.now(UTC).isoformat(timespec="seconds"),
            ),
        )
        summary = summarise(folder)
        report.write(folder)
        pages.write(folder)
        if not running.prometheus.missing:
            try:
                backfill.load_figures(folder)
            except (PrometheusError, OSError) as error:  # the run itself is whole
                teller.step(f"{error}; `make import RUN={folder.path}` tries again")
        if not summary.failed and not summary.missing:
            (folder.path / "COMPLETE").write_text(datetime.now(UTC).isoformat() + "\n")
    return folder


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for what a run needs on disk and nobody needs afterwards."""
    for left in SCRATCH.glob("run-*/"):  # by a run that was killed; we run alone
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=SCRATCH, prefix="run-") as folder:
        yield Path(folder)


def _manifest(setup: Setup, request: Request, prompts_sha256: str) -> Run:
    lab = setup.lab
    model = "" if setup.endpoint else "<model>"
    return Run(
        run_id=run_id(lab.digest()),
        lab=lab.resolved(),
        digest=lab.digest(),
        scale=models.scale_of(setup.machine),
        quick=request.quick,
        changes=request.changes,
        endpoint=request.endpoint or None,
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
                f"<{v.weights}>" if v.weights else model,
                *ENGINES[v.engine].flag_argv(lab.flags_of(v)),
            ]
            for v in lab.variants
        },
        model_revision=models.revision(setup.model.path),
        model_files=models.file_hashes(setup.model.path),
        derived_sha256={
            name: hashlib.sha256(json.dumps(models.file_hashes(path)).encode()).hexdigest()
            for name, path in setup.places.items()
        },
        prompts_sha256=prompts_sha256,
        reproduces=request.reproduces,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _resumed(setup: Setup) -> RunFolder | None:
    folder = latest_run(setup.lab.name, complete=False)
    if folder is None:
        return None
    run = folder.run()
    same = (run.digest, run.model, run.machine.slug) == (
        setup.lab.digest(),
        setup.model.name,
        setup.machine.slug,
    )
    engines = {ENGINES[v.engine] for v in setup.lab.variants}
    same_engines = setup.endpoint is not None or all(
        run.environment.version_of(engine.distributions) == engine.version() for engine in engines
    )
    return folder if same and same_engines else None


def forecast_alone(request: Request, teller: Teller) -> tuple[Setup, PointForecasts]:
    """Forecast a lab's points without running it. Raises what `run` raises before its engines."""
    with alone(), _scratch() as work:
        setup = resolve(request, teller)
        teller.waiting("writing the prompts")
        write_requests(setup, work)
        return setup, forecast(setup, _files(setup, work), teller)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Two labs at once would measure each other. Raises LabError."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with (SCRATCH / "run.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LabError(
                "another lab is running from this checkout and would be measured too: wait for it"
            ) from error
        yield


def in_virtual_time(setup: Setup, work: Path, teller: Teller) -> PointForecasts | None:
    """Every point's forecast; None where vLLM's scheduler cannot be driven, which is told."""
    try:
        return forecast(setup, _files(setup, work), teller)
    except ForecastError as error:
        teller.step(f"No forecast: {error}; the run goes on with bounds alone")
        return None


def _files(setup: Setup, work: Path) -> dict[str, list[Path]]:
    """What each workload sends, repeat by repeat."""
    repeats = range(1, setup.lab.repeats + 1)
    return {w.name: [requests_file(work, w, r) for r in repeats] for w in setup.lab.workloads}


def predict(setup: Setup, forecasts: PointForecasts | None) -> Predictions:
    """What is written down before any engine starts.

    A claim is predicted by the ratio of its two points' forecasts where both have one; the lab's
    closed form then stands beside it as an explanation. Elsewhere it is the prediction.
    """
    lab, points = setup.lab, setup.points
    closed = {
        c.name: {f"{t.key}|{b.key}": c.predict(t, b) for t, b in lab.pairs(c, points)}
        for c in lab.claims
    }
    return Predictions(
        effects={
            c.name: {
                f"{t.key}|{b.key}": (forecasts and ratio_of_forecasts(forecasts, c.metric, t, b))
                or closed[c.name][f"{t.key}|{b.key}"]
                for t, b in lab.pairs(c, points)
            }
            for c in lab.claims
        },
        closed_forms=closed if forecasts and forecasts.points else {},
        in_virtual_time=forecasts,
        forecasts={
            f.name: {p.key: f.predict(p) for p in points if f.arm.matches(p)} for f in lab.forecasts
        },
    )
