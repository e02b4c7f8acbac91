"""The harness of a run: the instruments and the engines that they measure.

Prometheus, telemetry and the load generator live as long as the run, the engines as long as their
trials need them.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import requests

from dashboards import live
from dashboards.prometheus import Prometheus
from labs.harness.analysis.probes import ProbedEngine
from labs.harness.analysis.verdicts import may_be_decided
from labs.harness.derived.design import starts_on_file
from labs.harness.derived.lab_modules import probes_of
from labs.harness.derived.summarize import summarise
from labs.harness.forecast.request_counts import Counts
from labs.harness.plan.progress import ProgressDisplay
from labs.harness.plan.resolve import Setup, gpus_used
from labs.harness.reports import pages
from labs.harness.runner.engines import Engines, Groups, groups_in_turn, order_of_engines
from labs.harness.runner.load import LoadGenerator
from labs.harness.runner.trials import Trials, interleave, played_together, write_requests
from labs.harness.spec.lab import Point, Variant
from labs.harness.storage.recorded import Undecided
from labs.harness.storage.results import RESULTS, RunFolder
from labs.harness.storage.writing import write_gzip, write_json
from serving.engines.base import EngineError
from serving.hardware import gpus, reference_step, telemetry
from serving.hardware.reference_step import ReferenceTimer
from serving.processes.ports import LOOPBACK, free_port

# an answer that is not as it should be costs its probe alone
PROBE_ERRORS = (
    requests.RequestException, EngineError, ArithmeticError, AttributeError, LookupError,
    RuntimeError, StopIteration, TypeError, ValueError,
)  # fmt: skip


class NotTogether(EngineError):
    """Signals that engines that were to stay loaded together do not all start; says why."""


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
    groups: Groups
    failed_to_start: set[str] = field(default_factory=set)  # names of variants

    def play_lab(self) -> int:
        """Play the lab's own repeats; return how many trips through all engines that took.

        Engines that do not start together take turns, so that what cannot start alone costs its own
        trials. Raises EngineError where no variant's engine starts.
        """
        try:
            return self._play_trips()
        except NotTogether as error:
            self.progress.message(str(error))
            self.progress.message("Engines take turns, since not all start beside one another")
        self.groups = groups_in_turn(self.setup)
        self.trials.take_turns()
        return self._play_trips()

    def _play_trips(self) -> int:
        lab = self.setup.lab
        trips = order_of_engines(self.groups, range(1, lab.repeats + 1), lab.starts)
        visits = list(itertools.chain.from_iterable(trips))
        for number, (group, repeats) in enumerate(visits, 1):
            later = [(other, self._trials_of(other, some)) for other, some in visits[number:]]
            self.trials.starts_to_come = self._starts_of(later)
            self.play_repeats(group, repeats)
        return len(trips)

    def _trials_of(
        self, group: Sequence[Variant], repeats: Collection[int]
    ) -> list[tuple[Point, int]]:
        """Return the group's own trials of these repeats, in their order."""
        return [(p, r) for p, r in interleave(self.setup, group) if r in repeats]

    def _starts_of(
        self, visits: Iterable[tuple[Sequence[Variant], Sequence[tuple[Point, int]]]]
    ) -> int:
        """Count the engine starts for these trials of groups: none where engines stay loaded."""
        if len(self.groups) == 1:
            return 0
        return sum(
            bool(self.trials.due(trials))
            for group, trials in visits
            if not self.failed_to_start.intersection(v.name for v in group)
        )

    def play_trials(
        self, group: Sequence[Variant], trials: Sequence[tuple[Point, int]], probe: bool
    ) -> None:
        """Play those of these trials that are not recorded; with `probe` run the probes after them.

        Some variants have no trials, and are probed alone. Where the engines do not start, their
        trials are recorded as failed and the run goes on. Raises EngineError where no variant's
        engine starts, and NotTogether where several do not all start and nothing was played yet.
        """
        due = self.trials.due(trials)
        probes_due = probe and any(self._probes_due(variant) for variant in group)
        self._count_probes()
        if self.failed_to_start.intersection(v.name for v in group) or not (due or probes_due):
            return
        clock, names = self.setup.clock, ", ".join(v.name for v in group)
        in_turn = len(self.groups) > 1
        starts = in_turn or any(self.engines.alive(variant) is None for variant in group)
        start_s = clock.start_s(self.setup.machine.kind) if starts else 0.0
        parts = played_together(self.setup, group, due)
        first_s = self.trials.trial_s(*(point for point, _ in parts[0])) if due else 0.0
        clock.require(start_s + first_s, f"starting {names}, and its first trial,")
        try:
            if self.engines.load(group, anew=in_turn):
                self.progress.expect(self.trials.remaining_s)
        except EngineError as error:
            self.engines.unload()
            if len(group) > 1 and not self.trials.any_recorded:
                raise NotTogether(str(error)) from error
            self.failed_to_start.update(v.name for v in group)
            none_starts = len(self.failed_to_start) == len(self.setup.lab.variants)
            if none_starts and not self.trials.any_recorded:
                raise
            self.trials.fail(interleave(self.setup, group), str(error))
            self.progress.message(str(error))
            return
        for part in parts:
            (point, repeat), *others = part
            beside = [other for other, _ in others]
            clock.require(self.trials.trial_s(point, *beside), "the next trial")
            self.trials.play(point, repeat, beside)
        for variant in group if probe else ():
            self._probe(variant)

    def play_repeats(self, group: Sequence[Variant], repeats: Collection[int]) -> None:
        """Play the group's trials of these repeats; after their last its engines are probed."""
        of_group = interleave(self.setup, group)
        last = max((repeat for _, repeat in of_group), default=self.setup.lab.repeats)
        self.play_trials(group, self._trials_of(group, repeats), probe=last in repeats)

    def repeat_undecided(self, until: float) -> None:
        """Repeat the points of claims that are undecided after the lab's own repeats.

        All get the same further repeats, up to the lab's `most_repeats` and none that would end
        after `until` on the monotonic clock; the verdicts that follow are the second look. Where no
        time is left for another repeat of any claim, that is settled before the figures are looked
        at, so that the lab looks once. Raises TimeUsedUp where the call's own time ends first: the
        next call continues with them.
        """
        lab = self.setup.lab
        further = range(lab.repeats + 1, lab.rounds + 1)
        if not further:
            return
        if self.folder.undecided() is None and not self._goes_on() and not self._has_time(until):
            write_json(self.folder.path / "undecided.json", Undecided(points=(), once=True))
            self.progress.message(f"The stated time is used up (most_s={lab.most_s:g})")
        points = self._undecided()
        if not points:
            return
        self.progress.message(
            f"Undecided after {lab.repeats} repeats: {len(points)} points get up to {len(further)}"
            f" more, until {lab.most_s:g} s have passed"
        )
        for trip in order_of_engines(self.groups, further, lab.starts):
            trials = [
                (group, [(p, r) for r in repeats for p in self._shuffled(points, group, r)])
                for group, repeats in trip
            ]
            self.trials.expect(sum(len(self.trials.due(of_group)) for _, of_group in trials))
            self.trials.starts_to_come = self._starts_of(trials)
            if time.monotonic() + self.trials.remaining_s > until:
                self.progress.message(f"The stated time is used up (most_s={lab.most_s:g})")
                return
            write_requests(self.setup, self.trials.work, self.progress, trip[0][1])
            self.progress.expect(self.trials.remaining_s)
            for number, (group, of_group) in enumerate(trials, 1):
                self.trials.starts_to_come = self._starts_of(trials[number:])
                self.play_trials(group, of_group, probe=bool(of_group))

    def _goes_on(self) -> set[str]:
        """Name the points of which more than the lab's own repeats are on file."""
        again = self.setup.lab.repeats + 1
        return {p.key for p in self.setup.points if self.folder.trial_result(p, again)}

    def _has_time(self, until: float) -> bool:
        """Tell whether one more repeat of the two points of a claim could end until then."""
        self.trials.expect(2)
        self.trials.starts_to_come = 0
        return time.monotonic() + self.trials.remaining_s <= until

    def _undecided(self) -> list[Point]:
        """Return the points of claims that were undecided after the lab's own repeats.

        The choice is kept: a resumed run goes on with the same points, so that no run looks more
        often than twice. Where it was not, a run goes on with those that have more repeats on file.
        """
        points = self.setup.points
        if (chosen := self.folder.undecided()) is None:
            if not (keys := self._goes_on()):
                summary = summarise(self.folder)
                deciding = {claim.name for claim in self.setup.lab.deciding}
                keys = {
                    key
                    for j in summary.judgements
                    if j.claim in deciding and may_be_decided(j, summary.measurements)
                    for key in (j.treatment, j.baseline)
                }
            chosen = Undecided(points=tuple(p.key for p in points if p.key in keys))
            if keys:
                write_json(self.folder.path / "undecided.json", chosen)
        return [p for p in points if p.key in chosen.points]

    def _shuffled(
        self, points: Sequence[Point], group: Sequence[Variant], repeat: int
    ) -> list[Point]:
        """Draw the order of the group's points in a further repeat."""
        names = {v.name for v in group}
        of_group = [p for p in points if p.variant.name in names]
        rng = random.Random(f"{self.setup.lab.seed}/order/{repeat}")
        return rng.sample(of_group, len(of_group))

    def _probe(self, variant: Variant) -> None:
        """Run those of the lab's probes on this engine that are not recorded."""
        for name in self._probes_due(variant):
            if (engine := self.engines.alive(variant)) is None:
                continue
            self.setup.clock.require(self.setup.clock.probe_s, f"the probe {name}")
            self.progress.waiting(f"{variant.name}: {name}")
            began = time.monotonic()
            setup = self.setup
            served = ProbedEngine(variant, setup.lab, engine, setup.places, setup.writer)
            try:
                with self.engines.others_suspended([variant]):
                    engine.reset_prefix_cache()
                    answers = probes_of(setup.lab.name)[name].ask(served)
            except PROBE_ERRORS as error:
                reason = f"{type(error).__name__}: {error}"
                self.progress.message(f"{variant.name}: the probe {name} failed: {reason}")
                continue
            finally:
                self.setup.clock.probed(time.monotonic() - began)
            write_gzip(self.folder.probe_file(name, variant.name), answers)
            self._count_probes()
            took = f"{variant.name}: the probe {name} took {time.monotonic() - began:.0f} s"
            self.progress.part_done(took, self.trials.remaining_s)

    def _count_probes(self) -> None:
        """Count the probes to come, on engines that have not failed to start."""
        variants = [v for v in self.setup.lab.variants if v.name not in self.failed_to_start]
        self.trials.probes_to_come = sum(len(self._probes_due(v)) for v in variants)

    def _probes_due(self, variant: Variant) -> list[str]:
        """Return the probes of this variant that are not recorded."""
        lab = self.setup.lab
        names = lab.probes if variant.name in (lab.probed or [variant.name]) else ()
        return [name for name in names if not self.folder.probe_file(name, variant.name).exists()]


@contextlib.contextmanager
def open_harness(
    setup: Setup, folder: RunFolder, work: Path, progress: ProgressDisplay, groups: Groups
) -> Iterator[Harness]:
    """Start the instruments; none of them and no engine is left when the block ends."""
    logs, labels = folder.path / "logs", {"lab": setup.lab.name, "run_id": folder.path.name}
    exporter_port = free_port()
    with contextlib.ExitStack() as exits:
        prometheus = exits.enter_context(Prometheus(logs / "prometheus.log"))
        prometheus.scrape("client", f"{LOOPBACK}:{exporter_port}")
        if prometheus.missing:
            progress.message(f"{prometheus.missing}; the run goes on: its records are complete")
        else:
            live.place(RESULTS, pages.script_hashes())
            progress.message(f"Prometheus: {prometheus.page_url}")
        hardware = None
        if not setup.endpoint:
            hardware = telemetry.source(setup.machine.kind, gpus_used(setup.lab))
        sampler = exits.enter_context(telemetry.Telemetry(hardware, labels))
        if sampler.serve(telemetry_port := free_port()):
            prometheus.scrape("client", f"{LOOPBACK}:{telemetry_port}")
        log = logs / "locust.log"
        load = LoadGenerator(setup, exporter_port, log)
        exits.callback(load.stop)
        reference = _reference(setup, folder, progress, exits)
        on_file = starts_on_file(folder, setup.points, setup.lab)
        engines = Engines(setup, logs, prometheus, labels, progress, on_file)
        exits.callback(engines.unload)
        counts = Counts(folder.path.name, exporter_port)
        in_turn = len(groups) > 1
        trials = Trials(
            setup, folder, work, engines, load, sampler, counts, progress, reference, in_turn
        )
        yield Harness(setup, folder, progress, prometheus, engines, trials, counts, groups)


def _reference(
    setup: Setup, folder: RunFolder, progress: ProgressDisplay, exits: contextlib.ExitStack
) -> ReferenceTimer | None:
    """Start the process that times the machine itself.

    None beside an endpoint, which may be on another machine, and where the GPU admits one process:
    that is the engine.
    """
    if setup.endpoint:
        return None
    mode = folder.run().environment.compute_mode
    if gpus.admits_one_process(mode):
        progress.message(
            f"The machine's own speed is not timed: the GPU's compute mode is {mode}, so that the"
            " engine alone can use it"
        )
        return None
    log = folder.path / "logs" / "reference-step.log"
    return exits.enter_context(reference_step.started(setup.machine.kind, log))
