"""The harness of a run: the instruments and the engines that they measure.

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
from labs.running.load import LoadGenerator
from labs.running.probes import PROBES, ProbedEngine
from labs.running.progress import ProgressDisplay
from labs.running.resolve import Setup
from labs.running.trials import Trials, interleave
from labs.telling import pages
from labs.telling.summary import summarise
from serving import reference_step, telemetry
from serving.engines.base import EngineError
from serving.ports import free_port


@dataclass
class Harness:
    """Has the engines of a run serve, plays their trials, and runs the probes."""

    setup: Setup
    folder: RunFolder
    progress: ProgressDisplay
    prometheus: Prometheus
    engines: Engines
    trials: Trials
    counts: Counts
    failed_to_start: set[str] = field(default_factory=set)  # names of variants

    def play_trials(self, group: Sequence[Variant], trials: Sequence[tuple[Point, int]]) -> None:
        """Play those of these trials that are not recorded; after the last repeat, run the probes.

        Where the engines do not start, their trials are recorded as failed and the run goes on.
        Raises EngineError where no variant's engine starts.
        """
        due = self.trials.due(trials)
        last_repeat_played = any(repeat >= self.setup.lab.repeats for _, repeat in trials)
        probes_due = last_repeat_played and any(self._probes_due(variant) for variant in group)
        if self.failed_to_start.intersection(v.name for v in group) or not (due or probes_due):
            return
        try:
            if self.engines.load(group):
                self.progress.expect(self.trials.remaining_s)
        except EngineError as error:
            self.engines.unload()
            self.failed_to_start.update(v.name for v in group)
            none_starts = len(self.failed_to_start) == len(self.setup.lab.variants)
            if none_starts and not self.trials.any_recorded:
                raise
            self.trials.fail(interleave(self.setup, group), str(error))
            self.progress.message(str(error))
            return
        for point, repeat in due:
            self.trials.play(point, repeat)
        for variant in group if last_repeat_played else ():
            self._probe(variant)

    def repeat_undecided(self, groups: Groups) -> None:
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
            self.progress.message(
                f"Undecided after {repeat - 1} repeats: {len(points)} points get another repeat"
                f" (at most {lab.rounds})"
            )
            self.progress.expect(self.trials.remaining_s)
            order = random.Random(f"{lab.seed}/order/{repeat}").sample(points, len(points))
            begun = self.engines.serves(groups[0][0])  # go on from the engine that is loaded
            for group in groups if begun else groups[::-1]:
                names = {v.name for v in group}
                self.play_trials(group, [(p, repeat) for p in order if p.variant.name in names])

    def _probe(self, variant: Variant) -> None:
        """Run those of the lab's probes on this engine that are not recorded."""
        for name in self._probes_due(variant):
            if (engine := self.engines.alive(variant)) is None:
                continue
            self.progress.waiting(f"{variant.name}: {name}")
            began = time.monotonic()
            engine.reset_prefix_cache()
            setup = self.setup
            served = ProbedEngine(variant, setup.lab, engine, setup.places, setup.writer)
            try:
                answers = PROBES[name](served)
            except (requests.RequestException, EngineError, KeyError, ValueError) as error:
                self.progress.message(f"{variant.name}: the probe {name} failed: {error}")
                continue
            write_gzip(self.folder.probe_file(name, variant.name), answers)
            self.progress.message(
                f"{variant.name}: the probe {name} took {time.monotonic() - began:.0f} s"
            )

    def _probes_due(self, variant: Variant) -> list[str]:
        """Return the probes of this variant that are not recorded."""
        lab = self.setup.lab
        names = lab.probes if variant.name in (lab.probed or [variant.name]) else ()
        return [name for name in names if not self.folder.probe_file(name, variant.name).exists()]


@contextlib.contextmanager
def open_harness(
    setup: Setup, folder: RunFolder, work: Path, progress: ProgressDisplay
) -> Iterator[Harness]:
    """Start the instruments; none of them and no engine is left when the block ends."""
    logs, labels = folder.path / "logs", {"lab": setup.lab.name, "run_id": folder.path.name}
    exporter_port = free_port()
    with contextlib.ExitStack() as exits:
        prometheus = exits.enter_context(Prometheus(logs / "prometheus.log"))
        prometheus.scrape("client", f"127.0.0.1:{exporter_port}")
        if prometheus.missing:
            progress.message(f"{prometheus.missing}; the run goes on: its records are complete")
        else:
            live.place(RESULTS, pages.script_hashes())
            progress.message(f"Prometheus: {prometheus.page_url}")
        hardware = None if setup.endpoint else telemetry.source(setup.machine.kind)
        sampler = exits.enter_context(telemetry.Telemetry(hardware, labels))
        if sampler.serve(telemetry_port := free_port()):
            prometheus.scrape("client", f"127.0.0.1:{telemetry_port}")
        load = LoadGenerator(setup, exporter_port, logs / "locust.log")
        exits.callback(load.stop)
        reference = None
        if not setup.endpoint:
            log = logs / "reference-step.log"
            reference = exits.enter_context(reference_step.started(setup.machine.kind, log))
        engines = Engines(setup, logs, prometheus, labels, progress)
        exits.callback(engines.unload)
        counts = Counts(folder.path.name, exporter_port)
        trials = Trials(setup, folder, work, engines, load, sampler, counts, progress, reference)
        yield Harness(setup, folder, progress, prometheus, engines, trials, counts)
