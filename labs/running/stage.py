"""The processes of a run, and the trials played on them."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import requests

from dashboards import live
from dashboards.prometheus import Prometheus
from labs.filing.results import (
    RESULTS,
    Agreement,
    RunFolder,
    TrialResult,
    snapshot_json,
    write_gzip,
    write_json,
)
from labs.lab import LabError, Point, Variant
from labs.running.machine_load import Others
from labs.running.probes import PROBES, Served
from labs.running.resolve import Setup, Teller
from labs.telling.summary import summarise
from loadtests import generator, plan, records
from loadtests.workload import Workload
from serving import machine as machines
from serving import metrics, telemetry
from serving.engines import ENGINES
from serving.engines.base import Engine, EngineError, Server, with_places
from serving.metrics import Snapshot
from serving.ports import free_port
from serving.process import Process

PER_TRIAL_S = 2.0  # drain and bookkeeping, for the estimate of the time remaining

Groups = list[list[Variant]]  # variants that stay loaded together


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


def resident_groups(setup: Setup) -> Groups:
    """All variants where host memory admits it, else one at a time.

    A GPU engine takes its share of the device for itself, so there they take turns, in an order
    that is drawn: none is always measured first.
    """
    variants = list(setup.lab.variants)
    if len(variants) == 1 or setup.endpoint:
        return [variants]
    if setup.machine.kind == "cpu":
        need = [
            ENGINES[v.engine].host_memory_bytes(setup.lab.flags_of(v), setup.model.shape)
            for v in variants
        ]
        known = [n for n in need if n is not None]
        if known == need and sum(known) < 0.7 * psutil.virtual_memory().available:
            return [variants]
    turns = random.Random(f"{setup.lab.seed}/turns")
    return [[v] for v in turns.sample(variants, len(variants))]


def in_turn(groups: Groups, repeats: int) -> list[tuple[list[Variant], range]]:
    """Which engines are loaded one after another, and the repeats that they then play.

    There and back, A B C and C B A: what drifts meanwhile then tells the repeats apart, not the
    variants alone, and is in the intervals. With fewer than three repeats, there alone.
    """
    if len(groups) == 1 or repeats < 3:
        return [(group, range(1, repeats + 1)) for group in groups]
    there, back = range(1, repeats // 2 + 1), range(repeats // 2 + 1, repeats + 1)
    return [*((group, there) for group in groups), *((group, back) for group in groups[::-1])]


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


class Stage:
    """Prometheus, telemetry and the load generator of a run; engines while they are loaded."""

    def __init__(self, setup: Setup, folder: RunFolder, work: Path, teller: Teller) -> None:
        self.setup, self.folder, self.work, self.teller = setup, folder, work, teller
        self.logs = folder.path / "logs"
        self.engine_start_s = self.load_s = 0.0
        self.running: dict[str, Server] = {}
        self.lost: set[str] = set()  # variants whose engine does not start
        self.exits = contextlib.ExitStack()
        self.counts: dict[str, int] = {"requests": 0, "output tokens": 0}
        self.discarded: dict[str, int] = {"requests": 0, "output tokens": 0}  # of failed trials
        self.engine_counts: dict[str, int | None] = {"requests": 0, "output tokens": 0}
        self.left = sum(
            not self._is_on_file(p, r) for p, r in interleave(setup, setup.lab.variants)
        )
        self.label = {"lab": setup.lab.name, "run_id": folder.path.name}
        own = None if setup.endpoint else telemetry.source(setup.machine.kind)
        self.telemetry = telemetry.Telemetry(own, self.label)

    # processes

    def __enter__(self) -> Stage:
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
            live.place(RESULTS)
            self.teller.step(f"Prometheus: {self.prometheus.page_url}")
        self.exits.enter_context(self.telemetry)
        if self.telemetry.serve(telemetry_port := free_port()):
            self.prometheus.scrape("client", f"127.0.0.1:{telemetry_port}")
        self._start_generator(exporter_port)
        self.exits.callback(self.unload)

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

    def load(self, group: Sequence[Variant]) -> None:
        """Have the engines of these variants serve, and no others. Raises EngineError."""
        if self.running.keys() == {v.name for v in group}:
            return
        self.unload()
        starting = [(v, self._launch(v)) for v in group]  # side by side: they import for long
        for variant, engine in starting:
            self._await(variant, engine)
        self.teller.plan(self.left * self._trial_s())

    def unload(self) -> None:
        for engine in self.running.values():
            engine.stop()
        self.running.clear()
        self.prometheus.forget("engine")  # the next one may get a port of theirs

    def _launch(self, variant: Variant) -> Server:
        setup = self.setup
        if setup.endpoint:
            self.running[variant.name] = setup.endpoint
            return setup.endpoint
        engine = ENGINES[variant.engine](
            variant.name,
            setup.weights.get(variant.name, setup.model),
            with_places(setup.lab.flags_of(variant), setup.places),
            kind=setup.machine.kind,
            log=self.logs / f"engine-{variant.name}.log",
            command=setup.engine_command,
            beside=setup.lab.all_flags,
        )
        self.running[variant.name] = engine
        return engine

    def _await(self, variant: Variant, engine: Server) -> None:
        if not isinstance(engine, Engine):
            return
        began = time.monotonic()
        # on a GPU it compiles and captures, for minutes the first time
        on_cpu = self.setup.machine.kind == "cpu"
        about = f" of about {engine.start_s:.0f}" if on_cpu and engine.start_s else ""
        starting = f"starting {engine.title} ({variant.name})"
        engine.wait(lambda s: self.teller.waiting(f"{starting}: {s:.0f} s{about}"))
        took = time.monotonic() - began
        self.engine_start_s += took
        serves = f"{engine.title} ({variant.name}) serves at {engine.url}"
        self.teller.step(f"{serves} after {took:.0f} s")
        self.prometheus.scrape("engine", engine.url, {**self.label, "variant": variant.name})

    # trials

    def visit(self, group: Sequence[Variant], trials: Sequence[tuple[Point, int]]) -> None:
        """Play what of these trials is not on file; after the last repeats, probe the engines.

        Where they do not start their trials fail, others may succeed. Raises EngineError when no
        variant's does.
        """
        due = [(point, repeat) for point, repeat in trials if not self._is_on_file(point, repeat)]
        ended = any(repeat >= self.setup.lab.repeats for _, repeat in trials)
        asked = ended and any(self._unasked(variant) for variant in group)
        if self.lost.intersection(v.name for v in group) or not (due or asked):
            return
        try:
            self.load(group)
        except EngineError as error:
            self.unload()
            self.lost.update(v.name for v in group)
            if len(self.lost) == len(self.setup.lab.variants) and not self.measured:
                raise
            self.give_up(group, error)
            return
        for point, repeat in due:
            self.trial(point, repeat)
        for variant in group if ended else ():
            self.probe(variant)

    def _is_on_file(self, point: Point, repeat: int) -> bool:
        found = self.folder.trial_result(point, repeat)
        return found is not None and found.failed is None

    def trial(self, point: Point, repeat: int) -> None:
        """Play one trial; a failure is recorded with its reason."""
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
        every = interleave(self.setup, self.setup.lab.variants)
        return any(self._is_on_file(point, repeat) for point, repeat in every)

    def give_up(self, group: Sequence[Variant], error: EngineError) -> None:
        """Their engine does not start: all their trials that are not on file fail for it."""
        for point, repeat in interleave(self.setup, group):
            if not self._is_on_file(point, repeat):
                result = TrialResult(point=point.key, repeat=repeat, failed=str(error))
                write_json(self.folder.trial_folder(point, repeat) / "trial.json", result)
                self.left -= 1
        self.teller.step(str(error))

    def settle(self, groups: Groups) -> None:
        """Repeat the points of claims that are still undecided, as often as the lab admits."""
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
            order = random.Random(f"{lab.seed}/order/{repeat}").sample(points, len(points))
            begun = groups[0][0].name in self.running  # go on from the engine that is loaded
            for group in groups if begun else groups[::-1]:
                names = {v.name for v in group}
                self.visit(group, [(p, repeat) for p in order if p.variant.name in names])

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
        if point.flags.enable_prefix_caching and point.workload.primed and point.workload.prefix:
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
        for name in self._unasked(variant):
            if engine is None or engine.died():
                continue
            path = self.folder.probe_file(name, variant.name)
            self.teller.waiting(f"{variant.name}: {name}")
            began = time.monotonic()
            engine.reset_prefix_cache()
            served = Served(variant, lab, engine, self.setup.places, self.setup.writer)
            try:
                found = PROBES[name](served)
            except (requests.RequestException, EngineError, KeyError, ValueError) as error:
                self.teller.step(f"{variant.name}: the probe {name} failed: {error}")
                continue
            write_gzip(path, found)
            self.teller.step(f"{variant.name}: {name} asked in {time.monotonic() - began:.0f} s")

    def _unasked(self, variant: Variant) -> list[str]:
        """The probes of this variant that are not on file."""
        lab = self.setup.lab
        names = lab.probes if variant.name in (lab.probed or [variant.name]) else ()
        return [name for name in names if not self.folder.probe_file(name, variant.name).exists()]

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


def _settled(engine: Server, before: Snapshot | None, done: int) -> Snapshot | None:
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
