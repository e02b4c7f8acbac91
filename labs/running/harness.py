"""The harness of a run: what measures and the engines that are measured, held together.

Prometheus, telemetry and the load generator live as long as the run, the engines as long as their
trials need them.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import requests

from dashboards import live
from dashboards.prometheus import Prometheus
from labs.filing.results import RESULTS, RunFolder, write_gzip
from labs.lab import Point, Variant
from labs.running.counts import Counts
from labs.running.engines import Engines, Groups
from labs.running.probes import PROBES, Served
from labs.running.resolve import Setup, Teller
from labs.running.trials import Trials, interleave
from labs.telling.summary import summarise
from loadtests import generator
from serving import machine as machines
from serving import telemetry
from serving.engines.base import EngineError
from serving.ports import free_port
from serving.process import Process


@dataclass
class Harness:
    """Visits the engines in turn: has them serve, plays their trials, and asks the probes."""

    setup: Setup
    folder: RunFolder
    teller: Teller
    prometheus: Prometheus
    engines: Engines
    trials: Trials
    counts: Counts
    failed_to_start: set[str] = field(default_factory=set)  # names of variants

    def visit(self, group: Sequence[Variant], trials: Sequence[tuple[Point, int]]) -> None:
        """Play what of these trials is not recorded; after the last repeats, probe the engines.

        Where they do not start their trials fail, others may succeed. Raises EngineError when no
        variant's does.
        """
        due = self.trials.due(trials)
        ended = any(repeat >= self.setup.lab.repeats for _, repeat in trials)
        probes_due = ended and any(self._probes_due(variant) for variant in group)
        if self.failed_to_start.intersection(v.name for v in group) or not (due or probes_due):
            return
        try:
            if self.engines.load(group):
                self.teller.plan(self.trials.remaining_s)
        except EngineError as error:
            self.engines.unload()
            self.failed_to_start.update(v.name for v in group)
            none_starts = len(self.failed_to_start) == len(self.setup.lab.variants)
            if none_starts and not self.trials.any_recorded:
                raise
            self.trials.fail(interleave(self.setup, group), str(error))
            self.teller.step(str(error))
            return
        for point, repeat in due:
            self.trials.play(point, repeat)
        for variant in group if ended else ():
            self._probe(variant)

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
            self.trials.expect(len(points))
            self.teller.step(
                f"Undecided after {repeat - 1} repeats: {len(points)} points get another"
                f" (at most {lab.rounds})"
            )
            self.teller.plan(self.trials.remaining_s)
            order = random.Random(f"{lab.seed}/order/{repeat}").sample(points, len(points))
            begun = self.engines.serves(groups[0][0])  # go on from the engine that is loaded
            for group in groups if begun else groups[::-1]:
                names = {v.name for v in group}
                self.visit(group, [(p, repeat) for p in order if p.variant.name in names])

    def _probe(self, variant: Variant) -> None:
        """Ask what the lab wants to know of this engine beside the load, unless it is recorded."""
        for name in self._probes_due(variant):
            if (engine := self.engines.alive(variant)) is None:
                continue
            self.teller.waiting(f"{variant.name}: {name}")
            began = time.monotonic()
            engine.reset_prefix_cache()
            setup = self.setup
            served = Served(variant, setup.lab, engine, setup.places, setup.writer)
            try:
                answers = PROBES[name](served)
            except (requests.RequestException, EngineError, KeyError, ValueError) as error:
                self.teller.step(f"{variant.name}: the probe {name} failed: {error}")
                continue
            write_gzip(self.folder.probe_file(name, variant.name), answers)
            self.teller.step(f"{variant.name}: {name} asked in {time.monotonic() - began:.0f} s")

    def _probes_due(self, variant: Variant) -> list[str]:
        """The probes of this variant that are not recorded."""
        lab = self.setup.lab
        names = lab.probes if variant.name in (lab.probed or [variant.name]) else ()
        return [name for name in names if not self.folder.probe_file(name, variant.name).exists()]


@contextlib.contextmanager
def started(setup: Setup, folder: RunFolder, work: Path, teller: Teller) -> Iterator[Harness]:
    """Start what measures; nothing of it and no engine is left when the block ends."""
    logs, labels = folder.path / "logs", {"lab": setup.lab.name, "run_id": folder.path.name}
    exporter_port = free_port()
    with contextlib.ExitStack() as exits:
        prometheus = exits.enter_context(Prometheus(logs / "prometheus.log"))
        prometheus.scrape("client", f"127.0.0.1:{exporter_port}")
        if prometheus.missing:
            teller.step(f"{prometheus.missing}; the run goes on: its records are complete")
        else:
            live.place(RESULTS)
            teller.step(f"Prometheus: {prometheus.page_url}")
        own = None if setup.endpoint else telemetry.source(setup.machine.kind)
        sampler = exits.enter_context(telemetry.Telemetry(own, labels))
        if sampler.serve(telemetry_port := free_port()):
            prometheus.scrape("client", f"127.0.0.1:{telemetry_port}")
        load = exits.enter_context(_load_generator(setup, exporter_port, logs))
        engines = Engines(setup, logs, prometheus, labels, teller)
        exits.callback(engines.unload)
        counts = Counts(folder.path.name, exporter_port)
        trials = Trials(setup, folder, work, engines, load, sampler, counts, teller)
        yield Harness(setup, folder, teller, prometheus, engines, trials, counts)


@contextlib.contextmanager
def _load_generator(setup: Setup, exporter_port: int, logs: Path) -> Iterator[generator.Generator]:
    argv = generator.argv(setup.users, exporter_port, free_port(), setup.lab.load_processes)
    cores = machines.split_cores(setup.machine.kind)[1]
    with Process("locust", argv, log=logs / "locust.log", cores=cores, talk=True) as child:
        yield generator.Generator(child)
