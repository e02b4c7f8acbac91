"""A run, from a question to a report: `run()` reads top to bottom as what happens."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import psutil
import requests

from dashboards import live
from dashboards.prometheus import Prometheus, PrometheusError
from labs import backfill, derived, html, report, theory
from labs.findings import FINDINGS
from labs.findings.context import Context
from labs.judge import Caveat, confounded, first_trial_slow, judge, judge_forecast, validity
from labs.lab import Claim, Forecast, Lab, LabError, Point, Variant
from labs.measure import LEAST_SAMPLES, METRICS, measure, percentile, price_per_hour
from labs.others import Others
from labs.plots import PLOTS
from labs.probes import PROBES, Served
from labs.results import (
    RESULTS,
    Agreement,
    MachineFile,
    Predictions,
    Run,
    RunFolder,
    Session,
    Summary,
    TrialResult,
    latest,
    read_json,
    require_space,
    run_id,
    snapshot_json,
    write_gzip,
    write_json,
)
from loadtests import generator, plan, records
from loadtests.arrivals import Concurrent
from loadtests.prompts import Writer, counter
from loadtests.workload import Workload
from serving import dummy, metrics, models, telemetry
from serving import machine as machines
from serving.engine import (
    SERVER,
    Endpoint,
    EngineError,
    VllmEngine,
    check_flags,
    flag_argv,
    free_port,
    placed,
    serve_env,
)
from serving.machine import Ceilings, Environment, Machine
from serving.metrics import Snapshot
from serving.process import Process

PER_TRIAL_S = 2.0  # drain and bookkeeping, for the estimate of the time remaining
ACTIVATION_BYTES = 10**9  # at least, beside weights and KV cache on a GPU
ENGINE_OVERHEAD_BYTES = 2 * 2**30  # a vLLM process beside its weights and KV cache
STEAL_SHARE = 0.05
OTHERS_SHARE = 0.1


class Teller(Protocol):
    """Whoever shows a run to a person."""

    def step(self, text: str) -> None: ...
    def plan(self, seconds: float) -> None: ...
    def waiting(self, text: str) -> None: ...
    def trial_done(self, text: str, remaining_s: float) -> None: ...
    def show(self, text: str, rows: Sequence[Sequence[str]]) -> None: ...


@dataclass(frozen=True)
class Request:
    """What the reader asked for."""

    lab: Lab
    quick: bool = False
    aa: bool = False  # the lab's baseline against itself
    changes: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    weights: str = ""  # `dummy`: random ones
    endpoint: str = ""
    resume: bool = False
    reproduces: str = ""  # the run whose resolved lab this is
    engine_command: Sequence[str] = SERVER


@dataclass(frozen=True)
class Setup:
    """Everything resolved and checked, before anything starts."""

    lab: Lab
    machine: Machine
    ceilings: Ceilings
    model: models.Model
    points: list[Point]
    places: dict[str, Path]  # derived model -> its folder
    weights: dict[str, models.Model]  # variant -> what it serves, where it is not the model itself
    writer: Writer
    endpoint: Endpoint | None
    engine_command: Sequence[str]

    @property
    def users(self) -> int:
        return max(p.load.seats for p in self.points)


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
        folder = folder or RunFolder.create(_manifest(setup, request, prompts))
        predictions = predict(setup)
        if not (folder.path / "predictions.json").exists():  # what was said before stays said
            write_json(folder.path / "predictions.json", predictions)
        teller.show(*report.predictions_table(setup.lab, predictions))
        for formula in report.formulas(predictions):
            teller.step(formula)
        session = _Session(setup, folder, work, teller)
        with session:
            groups = resident_groups(setup)
            for group in groups:
                try:
                    with session.engines(group):
                        for point, repeat in interleave(setup, group):
                            session.trial(point, repeat)
                        if len(group) == len(setup.lab.variants):
                            session.settle()
                        for variant in group:
                            session.probe(variant)
                except EngineError as error:  # it did not start; others may
                    if not session.measured and group is groups[-1]:
                        raise
                    session.give_up(group, error)
            agreement = session.agree()
        write_json(
            folder.path / "session.json",
            Session(
                engine_start_s=round(session.engine_start_s, 2),
                load_s=round(session.load_s, 2),
                wall_s=round(time.monotonic() - began, 2),
                resident=len(groups) == 1,
                agreement=agreement,
                prometheus=session.prometheus.missing,
                ended_at=datetime.now(UTC).isoformat(timespec="seconds"),
            ),
        )
        summary = summarise(folder)
        report.write(folder)
        html.write(folder)
        if not session.prometheus.missing:
            try:
                backfill.load_figures(folder)
            except (PrometheusError, OSError) as error:  # the run itself is whole
                teller.step(f"{error}; `make import RUN={folder.path}` tries again")
        if not summary.failed and not summary.missing:
            (folder.path / "COMPLETE").write_text(datetime.now(UTC).isoformat() + "\n")
    return folder


# --------------------------------------------------------------------------------------- resolve


def resolve(request: Request, teller: Teller) -> Setup:
    """Check everything that can be checked before the first process starts."""
    machine = machines.detect()
    lab = request.lab.at(
        models.scale_of(machine), request.quick, request.changes, is_dummy(request.weights)
    )
    lab = lab.against_itself() if request.aa else lab
    require_known_names(lab)
    require_devices(lab, machine)
    RESULTS.mkdir(parents=True, exist_ok=True)
    require_space(RESULTS)
    model = model_of(machine, request.model, request.weights)
    require_sizes(lab, model)
    require_memory(lab, machine, model)
    endpoint = None
    if request.endpoint:
        if len(lab.variants) > 1:
            raise LabError(
                f"{lab.name} compares engine settings, so it must start its own engines: leave"
                " ENDPOINT out"
            )
        endpoint = Endpoint(request.endpoint)
    else:
        check_flags([lab.flags_of(v) for v in lab.variants])
    writer = Writer(counter(str(model.path)))
    for workload in lab.workloads:
        try:
            workload.requests(1, lab.seed, writer)
        except ValueError as error:
            raise LabError(f"workload {workload.name}: {error}") from error
    places = {name: derived.make(model, name, teller.step) for name in lab.derived()}
    weights = {
        v.name: derived.with_weights(model, v.weights, places[v.weights])
        for v in lab.variants
        if v.weights
    }
    ceilings = measured_ceilings(machine, teller)
    teller.step(f"Machine: {machine.describe()}; {report.ceilings_text(ceilings)}")
    random_weights = ", random weights" if model.dummy else ""
    teller.step(
        f"Model: {model.name}, {model.shape.params / 1e6:,.0f} M parameters{random_weights}"
    )
    points = lab.points(
        model.shape,
        ceilings,
        {name: served.shape for name, served in weights.items()},
        {name: derived.about(path) for name, path in places.items()},
    )
    return Setup(
        lab, machine, ceilings, model, points, places, weights, writer, endpoint,
        request.engine_command,
    )  # fmt: skip


def is_dummy(weights: str) -> bool:
    """Of the setting WEIGHTS. Raises LabError for what it does not know."""
    if weights not in ("", "dummy"):
        raise LabError(f"WEIGHTS={weights} is not known: WEIGHTS=dummy serves random weights")
    return bool(weights)


def model_of(machine: Machine, wanted: str, weights: str) -> models.Model:
    """What MODEL and WEIGHTS ask for on this machine. Raises ModelError and LabError."""
    if is_dummy(weights):
        return dummy.resolve(machine, wanted)
    if wanted in dummy.SHAPES and not Path(wanted).exists():
        raise LabError(f"MODEL={wanted} is a shape without weights: say WEIGHTS=dummy with it")
    return models.resolve(machine, wanted)


PARALLEL = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")


def require_devices(lab: Lab, machine: Machine) -> None:
    """What is asked of vLLM's parallelism and sampling, this machine's kind and GPUs can do."""
    for variant in lab.variants:
        flags = lab.flags_of(variant)
        ways = math.prod(int(str(flags.get(flag, 1))) for flag in PARALLEL)
        gpus = machine.count if machine.kind == "gpu" else 0
        if ways > max(1, gpus) and flags.get("distributed-executor-backend") != "ray":
            raise LabError(
                f"TP x PP x DP = {ways} needs as many GPUs, and this machine has {gpus}: lower"
                " them, or span machines with SET=flags.distributed-executor-backend=ray"
            )
        speculation = flags.get("speculative-config", {})
        if machine.kind == "cpu" and "synthetic" in json.dumps(speculation):
            raise LabError(
                f"{variant.name} is to accept guesses at a rate that is set, and the sampler that"
                " does so is written in Triton, which vLLM's CPU engine lacks: this needs a GPU"
            )


def require_memory(lab: Lab, machine: Machine, model: models.Model) -> None:
    """On a GPU, weights and the KV memory a variant asks for leave room for activations."""
    if machine.kind == "cpu":
        return
    for variant in lab.variants:
        flags = lab.flags_of(variant)
        parts = math.prod(int(str(flags.get(flag, 1))) for flag in PARALLEL[:2])
        weights, kv = model.shape.weight_bytes / parts, flags.get("kv-cache-memory-bytes", 0)
        needed = weights + int(str(kv)) + ACTIVATION_BYTES
        if not variant.weights and needed > machine.memory_bytes:
            raise LabError(
                f"{variant.name}: {weights / 1e9:.1f} GB of weights, {int(str(kv)) / 1e9:.1f} of KV"
                f" cache and about {ACTIVATION_BYTES / 1e9:.0f} for activations do not fit the"
                f" GPU's {machine.memory_bytes / 1e9:.1f}: give a smaller model with MODEL=, more"
                " GPUs with TP=, or less with SET=flags.kv-cache-memory-bytes="
            )


def require_sizes(lab: Lab, model: models.Model) -> None:
    """The requests fit the model and the engines, and the engines' limits fit their memory."""
    longest = max(w.longest_tokens for w in lab.workloads)
    if longest > model.shape.max_positions:
        raise LabError(
            f"requests of up to {longest} tokens do not fit {model.name}'s"
            f" {model.shape.max_positions} positions: lower the lengths with SET="
        )
    for variant in lab.variants:
        flags = lab.flags_of(variant)
        limit, memory = flags.get("max-model-len"), flags.get("kv-cache-memory-bytes")
        if not isinstance(limit, int):
            continue
        if limit > model.shape.max_positions:
            raise LabError(
                f"{variant.name}'s max-model-len={limit} exceeds {model.name}'s"
                f" {model.shape.max_positions} positions: lower it and the lengths with SET="
            )
        sent = [w for w in lab.workloads if not w.only or variant.name in w.only]
        if (longest := max((w.longest_tokens for w in sent), default=0)) > limit:
            raise LabError(
                f"requests of up to {longest} tokens exceed {variant.name}'s max-model-len={limit}:"
                " lower the lengths or raise flags.max-model-len with SET="
            )
        value_bytes = theory.kv_value_bytes(str(flags.get("kv-cache-dtype", "auto")))
        needed = limit * model.shape.kv_bytes_per_token(value_bytes)
        if isinstance(memory, int) and memory < needed:
            raise LabError(
                f"{variant.name}'s kv-cache-memory-bytes={memory} cannot hold one request of"
                f" max-model-len={limit}, which takes {needed:.0f}: raise the one or lower the"
                " other with SET="
            )


def require_known_names(lab: Lab) -> None:
    """What only other modules know: metrics and plots; and the price, read when measuring."""
    parts: list[Claim | Forecast] = [*lab.claims, *lab.forecasts]
    for part in parts:
        if part.metric not in METRICS:
            known = ", ".join(METRICS)
            raise LabError(f"{part.name}: no metric {part.metric!r}; the known ones are {known}")
    for kind, names, known_names in (
        ("plot", lab.plots, PLOTS),
        ("probe", lab.probes, PROBES),
        ("finding", lab.findings, FINDINGS),
    ):
        for name in names:
            if name not in known_names:
                raise LabError(f"no {kind} {name!r}; the known ones are {', '.join(known_names)}")
    try:
        price_per_hour()
    except ValueError as error:
        raise LabError(str(error)) from error


def measured_ceilings(machine: Machine, teller: Teller) -> Ceilings:
    """From machine.json, or measured now and kept there."""
    path = RESULTS / machine.slug / "machine.json"
    if not path.exists():
        teller.step("Measuring memory bandwidth and BF16 rate (once a machine, about 15 s)")
        try:
            ceilings = machines.measure_ceilings(machine)
        except subprocess.CalledProcessError as error:
            last = str(error.stderr).strip().splitlines()[-1:]
            raise LabError(f"the ceilings could not be measured: {' '.join(last)}") from error
        write_json(path, MachineFile(machine=machine, ceilings=ceilings))
    return read_json(path, MachineFile).ceilings


def requests_file(work: Path, workload: Workload, repeat: int) -> Path:
    return work / f"{workload.name}-{repeat}.jsonl"


def write_requests(setup: Setup, work: Path) -> str:
    """Write what each repeat sends, the same for all its variants and loads; their SHA-256."""
    lab, written = setup.lab, []
    served = setup.endpoint.model if setup.endpoint else setup.model.name
    for workload in lab.workloads:
        for repeat in range(1, lab.rounds + 1):
            try:
                items = workload.requests(lab.requests, lab.draw_seed(repeat), setup.writer)
            except ValueError as error:
                raise LabError(f"workload {workload.name}: {error}") from error
            path = requests_file(work, workload, repeat)
            plan.write_requests(path, items, served)
            written.append(path)
    return plan.sent_sha256(written)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for what a run needs on disk and nobody needs afterwards."""
    for left in models.CACHE.glob("run-*/"):  # by a run that was killed; we run alone
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=models.CACHE, prefix="run-") as folder:
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
            v.name: [f"<{v.weights}>" if v.weights else model, *flag_argv(lab.flags_of(v))]
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


def engine_environment(kind: str, model: models.Model, lab: Lab) -> Environment:
    """Of this machine, with what an engine started here would find."""
    found = machines.environment(models.ROOT, kind)
    own = machines.engine_variables(serve_env(kind, model, lab.speculates))
    return found.model_copy(update={"variables": found.variables | own})


def _resumed(setup: Setup) -> RunFolder | None:
    folder = latest(setup.lab.name, complete=False)
    if folder is None:
        return None
    run = folder.run()
    same = (run.digest, run.model, run.machine.slug) == (
        setup.lab.digest(),
        setup.model.name,
        setup.machine.slug,
    )
    return folder if same else None


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Two labs at once would measure each other. Raises LabError."""
    models.CACHE.mkdir(exist_ok=True)
    with (models.CACHE / "run.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LabError(
                "another lab is running from this checkout and would be measured too: wait for it"
            ) from error
        yield


# --------------------------------------------------------------------------- predict and arrange


def predict(setup: Setup) -> Predictions:
    lab, points = setup.lab, setup.points
    return Predictions(
        effects={
            c.name: {f"{t.key}|{b.key}": c.predict(t, b) for t, b in lab.pairs(c, points)}
            for c in lab.claims
        },
        forecasts={
            f.name: {p.key: f.predict(p) for p in points if f.arm.matches(p)} for f in lab.forecasts
        },
    )


def resident_groups(setup: Setup) -> list[list[Variant]]:
    """Variants that stay loaded together: all where host memory admits it, else one at a time.

    A GPU engine takes its share of the device for itself, so there they take turns.
    """
    variants = list(setup.lab.variants)
    if len(variants) == 1 or setup.endpoint:
        return [variants]
    kv = [int(str(setup.lab.flags_of(v).get("kv-cache-memory-bytes", 4 * 2**30))) for v in variants]
    need = sum(kv) + len(variants) * (ENGINE_OVERHEAD_BYTES + setup.model.shape.weight_bytes)
    fits = setup.machine.kind == "cpu" and need < 0.7 * psutil.virtual_memory().available
    return [variants] if fits else [[v] for v in variants]


def interleave(setup: Setup, group: Sequence[Variant]) -> list[tuple[Point, int]]:
    """Every point once in random order, then all again: drift of the machine hits all alike."""
    rng = random.Random(f"{setup.lab.seed}/order")
    names = {v.name for v in group}
    points = [p for p in setup.points if p.variant.name in names]
    return [
        (point, repeat)
        for repeat in range(1, setup.lab.repeats + 1)
        for point in sorted(points, key=lambda _: rng.random())
    ]


# ---------------------------------------------------------------------------------- one sitting


class _Session:
    """The processes of a run, and the trials played on them."""

    def __init__(self, setup: Setup, folder: RunFolder, work: Path, teller: Teller) -> None:
        self.setup, self.folder, self.work, self.teller = setup, folder, work, teller
        self.logs = folder.path / "logs"
        self.engine_start_s = self.load_s = 0.0
        self.running: dict[str, VllmEngine | Endpoint] = {}
        self.exits = contextlib.ExitStack()
        self.counts: dict[str, int] = {"requests": 0, "output tokens": 0}
        self.discarded: dict[str, int] = {"requests": 0, "output tokens": 0}  # of failed trials
        self.engine_counts: dict[str, int | None] = {"requests": 0, "output tokens": 0}
        done = [
            folder.trial_result(p, r) for p in setup.points for r in range(1, setup.lab.repeats + 1)
        ]
        self.left = sum(d is None or d.failed is not None for d in done)
        self.label = {"lab": setup.lab.name, "run_id": folder.path.name}
        own = None if setup.endpoint else telemetry.source(setup.machine.kind)
        self.telemetry = telemetry.Telemetry(own, self.label)

    # processes

    def __enter__(self) -> _Session:
        try:
            self._start()
        except BaseException:  # what has started would be in the next lab's way
            self.exits.close()
            raise
        return self

    def _start(self) -> None:
        self.exporter_port = exporter_port = free_port()
        self.prometheus = self.exits.enter_context(Prometheus(self.logs / "prometheus.log"))
        self.prometheus.scrape("client", f"127.0.0.1:{exporter_port}")
        if self.prometheus.missing:
            self.teller.step(
                f"{self.prometheus.missing}; the run goes on: its records are complete"
            )
        else:
            live.place()
            self.teller.step(f"Prometheus: {self.prometheus.page_url}")
        self.exits.enter_context(self.telemetry)
        if self.telemetry.serve(telemetry_port := free_port()):
            self.prometheus.scrape("client", f"127.0.0.1:{telemetry_port}")
        self._start_generator(exporter_port)

    def _start_generator(self, exporter_port: int) -> None:
        child = self.exits.enter_context(
            Process(
                "locust",
                generator.argv(
                    self.setup.users, exporter_port, free_port(), self.setup.lab.load_processes
                ),
                log=self.logs / "locust.log",
                cores=machines.split_cores(self.setup.machine.kind)[1],
                talk=True,
            )
        )
        self.generator = generator.Generator(child)

    def __exit__(self, *_: object) -> None:
        self.exits.close()

    @contextlib.contextmanager
    def engines(self, group: Sequence[Variant]) -> Iterator[None]:
        """These variants' engines, serving."""
        try:
            starting = [(v, self._launch(v)) for v in group]  # side by side: they import for long
            for variant, engine in starting:
                self._await(variant, engine)
            self.teller.plan(self.left * self._trial_s())
            yield
        finally:
            for engine in self.running.values():
                engine.stop()
            self.running.clear()
            self.prometheus.forget("engine")  # the next one may get a port of theirs

    def _launch(self, variant: Variant) -> VllmEngine | Endpoint:
        setup = self.setup
        if setup.endpoint:
            self.running[variant.name] = setup.endpoint
            return setup.endpoint
        engine = VllmEngine(
            variant.name,
            setup.weights.get(variant.name, setup.model),
            placed(setup.lab.flags_of(variant), setup.places),
            kind=setup.machine.kind,
            log=self.logs / f"engine-{variant.name}.log",
            command=setup.engine_command,
            one_runner=setup.lab.speculates,
        )
        self.running[variant.name] = engine
        return engine

    def _await(self, variant: Variant, engine: VllmEngine | Endpoint) -> None:
        if isinstance(engine, Endpoint):
            return
        began = time.monotonic()
        # on a GPU it compiles and captures, for minutes the first time
        about = " of about 35" if self.setup.machine.kind == "cpu" else ""
        engine.wait(
            lambda s: self.teller.waiting(f"starting vLLM ({variant.name}): {s:.0f} s{about}")
        )
        took = time.monotonic() - began
        self.engine_start_s += took
        self.teller.step(f"vLLM ({variant.name}) serves at {engine.url} after {took:.0f} s")
        self.prometheus.scrape("engine", engine.url, {**self.label, "variant": variant.name})

    # trials

    def trial(self, point: Point, repeat: int) -> None:
        """Play one trial unless it is on file; a failure is recorded with its reason."""
        before = self.folder.trial_result(point, repeat)
        if before and not before.failed:
            return
        began, others = time.monotonic(), Others()
        of = max(repeat, self.setup.lab.repeats)
        name = f"{point.workload.name} {point.load}, repeat {repeat} of {of}"
        if len(self.setup.lab.variants) > 1:
            name = f"{point.variant.name} {name}"
        try:
            summary, engine, rate = self._play(point, repeat, name)
            stolen, strangers = others.shares()
            result = TrialResult(
                point=point.key, repeat=repeat, summary=summary, engine=engine,
                cpu_steal=stolen, cpu_others=strangers, took_s=round(time.monotonic() - began, 3),
            )  # fmt: skip
        except (EngineError, generator.GeneratorError, OSError) as error:
            result = TrialResult(point=point.key, repeat=repeat, failed=str(error))
            rate = f"failed: {str(error).splitlines()[0]}"
        write_json(self.folder.trial_folder(point, repeat) / "trial.json", result)
        self.left -= 1
        self.teller.trial_done(f"{name}: {rate}", self.left * self._trial_s())

    @property
    def measured(self) -> bool:
        """Whether any trial has succeeded, in this sitting or before."""
        results = (
            self.folder.trial_result(p, r)
            for p in self.setup.points
            for r in range(1, self.setup.lab.repeats + 1)
        )
        return any(r is not None and r.failed is None for r in results)

    def give_up(self, group: Sequence[Variant], error: EngineError) -> None:
        """Their engine does not start: all their trials that are not on file fail for it."""
        for point, repeat in interleave(self.setup, group):
            before = self.folder.trial_result(point, repeat)
            if before is None or before.failed:
                result = TrialResult(point=point.key, repeat=repeat, failed=str(error))
                write_json(self.folder.trial_folder(point, repeat) / "trial.json", result)
                self.left -= 1
        self.teller.step(str(error))

    def settle(self) -> None:
        """Repeat the points of claims that are still undecided, as often as the lab admits.

        Only where all engines stand loaded: later repeats of one side alone would meet another
        machine than the earlier ones did.
        """
        lab = self.setup.lab
        for repeat in range(lab.repeats + 1, lab.rounds + 1):
            keys = {
                key
                for j in summarise(self.folder).judgements
                if j.outcome == "inconclusive" and j.effect
                for key in (j.treatment, j.baseline)
            }
            points = [p for p in self.setup.points if p.key in keys]
            if not points:
                return
            self.left = len(points)
            self.teller.step(
                f"Undecided after {repeat - 1} repeats: {len(points)} points get another"
                f" (at most {lab.rounds})"
            )
            self.teller.plan(self.left * self._trial_s())
            for point in random.Random(f"{lab.seed}/order/{repeat}").sample(points, len(points)):
                self.trial(point, repeat)

    def _play(
        self, point: Point, repeat: int, name: str
    ) -> tuple[plan.TrialSummary, dict[str, Any] | None, str]:
        setup = self.setup
        if (engine := self.running.get(point.variant.name)) is None or engine.died():
            if engine:
                engine.stop()
            engine = self._launch(point.variant)  # it died in an earlier trial: a new one
            self._await(point.variant, engine)
        engine.reset_prefix_cache()
        sending = requests_file(self.work, point.workload, repeat)
        cached = point.variant.flags.get("enable-prefix-caching") is not False
        if cached and point.workload.primed and point.workload.prefix:
            _prime(engine.url, sending, point.workload.prefix.groups, setup.lab.timeout_s)
        before = engine.snapshot()
        path = self.folder.trial_folder(point, repeat) / "requests.jsonl.gz"
        trial_plan = plan.TrialPlan(
            url=engine.url,
            arrival=point.load,
            requests=sending,
            records=path,
            warmup_s=point.workload.warmup_s or setup.lab.warmup_s,
            window_s=setup.lab.window_s,
            timeout_s=setup.lab.timeout_s,
            seed=setup.lab.draw_seed(repeat),
            lab=setup.lab.name,
            variant=point.variant.name,
            run_id=self.folder.path.name,
            workload=point.workload.name,
            keep_text=point.workload.keep_text,
            slo_s=setup.lab.slo.by_name(),
        )
        began = time.monotonic()
        self.telemetry.begin(point.variant.name)
        summary = self.generator.play(trial_plan, lambda: self.teller.waiting(name))
        self.telemetry.write(path.with_name("telemetry.csv.gz"), summary.started_unix_s)
        self.load_s += time.monotonic() - began
        found = list(records.read(path))
        done = [r for r in found if r.ok]
        if summary.aborted or engine.died():
            _add(self.discarded, done)
            raise EngineError(engine.died() or summary.aborted or "")
        engine_delta = _settled(engine, before, len(done))
        self._count(done, engine_delta)
        start, end = summary.window_s
        tokens = sum(k for r in found for at, k in r.chunks if start <= at < end)
        rate = f"{tokens / (end - start):.0f} tok/s" if end > start else "nothing in the window"
        return summary, None if engine_delta is None else snapshot_json(engine_delta), rate

    def probe(self, variant: Variant) -> None:
        """Ask what the lab wants to know of this engine beside the load, unless it is on file."""
        engine, lab = self.running.get(variant.name), self.setup.lab
        for name in lab.probes if variant.name in (lab.probed or [variant.name]) else ():
            path = self.folder.probe_file(name, variant.name)
            if path.exists() or engine is None or engine.died():
                continue
            self.teller.waiting(f"{variant.name}: {name}")
            began = time.monotonic()
            engine.reset_prefix_cache()
            served = Served(
                variant, lab, engine.url, engine.model, self.setup.places, self.setup.writer
            )
            try:
                found = PROBES[name](served)
            except (requests.RequestException, KeyError, ValueError) as error:
                self.teller.step(f"{variant.name}: the probe {name} failed: {error}")
                continue
            write_gzip(path, found)
            self.teller.step(f"{variant.name}: {name} asked in {time.monotonic() - began:.0f} s")

    def _trial_s(self) -> float:
        """About how long a trial takes: the mean over the points."""
        lab, points = self.setup.lab, self.setup.points
        warmup_s = sum(p.workload.warmup_s or lab.warmup_s for p in points) / len(points)
        return warmup_s + lab.window_s + PER_TRIAL_S

    # counting three ways

    def _count(self, done: list[records.RequestRecord], engine: Snapshot | None) -> None:
        _add(self.counts, done)
        for what, metric in (
            ("requests", metrics.REQUESTS),
            ("output tokens", metrics.GENERATION_TOKENS),
        ):
            known = self.engine_counts[what]
            value = None if engine is None else engine.values.get(metric)
            self.engine_counts[what] = (
                None if known is None or value is None else known + int(value)
            )

    def agree(self) -> list[Agreement]:
        """The same counts in the records, in Prometheus, and in the engines.

        Prometheus is asked for this sitting's exporter alone; a run that was resumed had others.
        """
        ours = f'run_id="{self.folder.path.name}",instance="127.0.0.1:{self.exporter_port}"'
        queries = {
            "requests": f'sum(lab_requests_total{{outcome="ok",{ours}}})',
            "output tokens": f"sum(lab_output_tokens_total{{{ours}}})",
        }
        found = []
        for what, query in queries.items():
            value = self.prometheus.settle(query, self.counts[what] + self.discarded[what])
            found.append(
                Agreement(
                    what=what,
                    records=self.counts[what],
                    prometheus=None if value is None else int(value) - self.discarded[what],
                    engine=self.engine_counts[what],
                )
            )
        return found


def _prime(url: str, sending: Path, groups: int, timeout_s: float) -> None:
    """Have the engine prefill the first request of each prefix group, one after another."""
    for planned in plan.read_requests(sending)[:groups]:
        body = {**json.loads(planned.body), "max_tokens": 1, "stream": False}
        del body["stream_options"]
        answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=timeout_s)
        answer.raise_for_status()


def _add(counts: dict[str, int], done: Sequence[records.RequestRecord]) -> None:
    counts["requests"] += len(done)
    counts["output tokens"] += sum(r.output_tokens or 0 for r in done)


def _settled(engine: VllmEngine | Endpoint, before: Snapshot | None, done: int) -> Snapshot | None:
    """The engine's counters over the trial, read once it has counted the last request."""
    if before is None:
        return None
    deadline = time.monotonic() + 2
    while (after := engine.snapshot()) is not None:
        delta = after.since(before)
        counted = delta.values.get(metrics.REQUESTS)
        if counted is None or counted >= done or time.monotonic() > deadline:
            return delta
        time.sleep(0.05)
    return None


@contextlib.contextmanager
def start_locust_ui(
    lab: Lab,
    changes: dict[str, Any],
    workload: str,
    endpoint: str,
    model: str,
    weights: str,
    web_port: int,
) -> Iterator[Process]:
    """Locust's web UI sending a lab's workload to a running server; ends with the block."""
    machine = machines.detect()
    resolved = lab.at(models.scale_of(machine), False, changes, is_dummy(weights))
    by_name = {w.name: w for w in resolved.workloads}
    if workload and workload not in by_name:
        raise LabError(f"{lab.name} has no workload {workload!r}; it has {', '.join(by_name)}")
    chosen = by_name[workload] if workload else resolved.workloads[0]
    server = Endpoint(endpoint)
    writer = Writer(counter(str(model_of(machine, model, weights).path)))
    work = models.CACHE / "locust"
    plan.write_requests(
        work / "requests.jsonl",
        chosen.requests(resolved.requests, resolved.seed, writer),
        server.model,
    )
    by_hand = plan.TrialPlan(
        url=server.url,
        arrival=Concurrent(users=1),  # the number of users is chosen in the web UI
        requests=work / "requests.jsonl",
        records=work / "records.jsonl.gz",
        warmup_s=0,
        window_s=None,
        timeout_s=resolved.timeout_s,
        seed=resolved.seed,
        lab=lab.name,
        variant="by-hand",
        run_id="by-hand",
        workload=chosen.name,
    )
    (work / "plan.json").write_text(by_hand.model_dump_json())
    argv = generator.web_argv(work / "plan.json", 4, web_port, free_port(), free_port())
    with Process("locust", argv, log=work / "locust.log") as process:
        yield process


# ------------------------------------------------------------------------------ measure and judge


def summarise(folder: RunFolder) -> Summary:
    """Everything the report says, computed from the files of a run and nothing else."""
    run = folder.run()
    lab, points, predictions = run.rebuilt_lab(), run.points(), folder.predictions()
    values: dict[str, dict[int, dict[str, float | None]]] = {p.key: {} for p in points}
    samples: dict[str, dict[str, list[float]]] = {}
    caveats: dict[str, Caveat] = {}
    failed: dict[str, str] = {}

    def keep(caveat: Caveat) -> None:
        caveats.setdefault(f"{caveat.name}|{caveat.point}", caveat)

    for point, result, trial in folder.trials(points, lab):
        if trial is None:
            failed[f"{point.key}/{result.repeat}"] = result.failed or "no summary"
            continue
        values[point.key][result.repeat] = measure(trial)
        for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
            samples.setdefault(point.key, {}).setdefault(name, []).extend(trial.samples(name))
        # an endpoint's engine was not configured here: there is no treatment to prove
        for caveat in validity(trial, () if run.endpoint else lab.evidence):
            keep(caveat)
        if (result.cpu_steal or 0) > STEAL_SHARE:
            text = f"other guests of the host took {result.cpu_steal:.0%} of this trial's CPU time"
            keep(Caveat(name="load from others", text=text, point=point.key))
        if (result.cpu_others or 0) > OTHERS_SHARE and not run.endpoint:
            text = (
                f"other processes on this machine took {result.cpu_others:.0%} of its CPU time:"
                " end them and measure again"
            )
            keep(Caveat(name="other processes", text=text, point=point.key))
    for point in points:
        for caveat in first_trial_slow(values[point.key], point.key):
            keep(caveat)
    if run.endpoint:
        text = "predictions rest on this machine's ceilings; the endpoint may run on another"
        keep(Caveat(name="endpoint's hardware unknown", text=text))
    if any(flag in lab.flags_of(v) for flag in PARALLEL for v in lab.variants):
        text = "predictions rest on one GPU's ceilings and count no communication"
        keep(Caveat(name="several GPUs", text=text))
    found = list(caveats.values())
    judged = [
        (claim, t, b, confounded(claim, t, b))
        for claim in lab.claims
        for t, b in lab.pairs(claim, points)
    ]
    context = Context(folder, run, lab, points, values)
    summary = Summary(
        measurements=values,
        pooled={
            key: {
                f"{name[:-2]}_p{q}_s": v
                for name, drawn in of.items()
                for q in LEAST_SAMPLES
                if (v := percentile(drawn, q)) is not None
            }
            for key, of in samples.items()
        },
        judgements=[
            judge(
                claim,
                t.key,
                b.key,
                values,
                predictions.effects[claim.name][f"{t.key}|{b.key}"],
                [*found, *own],
            )
            for claim, t, b, own in judged
        ],
        forecasts=[
            judge_forecast(forecast, key, values.get(key, {}), prediction)
            for forecast in lab.forecasts
            for key, prediction in predictions.forecasts[forecast.name].items()
        ],
        findings=[FINDINGS[name](context) for name in lab.findings],
        caveats=[*found, *(caveat for *_, own in judged for caveat in own)],
        failed=failed,
        missing=sum(
            folder.trial_result(p, r) is None for p in points for r in range(1, lab.repeats + 1)
        ),
    )
    write_json(folder.path / "summary.json", summary)
    return summary
