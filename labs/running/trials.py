"""The trials of a run: what order they have, what they send, how one is played and recorded."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import requests

from labs.filing.results import RunFolder, TrialResult, snapshot_json, write_json
from labs.judging.measure import Trial, output_tokens_per_s
from labs.lab import LabError, Point, Variant
from labs.running.counts import Counts, counter_increase
from labs.running.engines import Engines
from labs.running.load import LoadGenerator
from labs.running.machine_load import OtherLoad
from labs.running.progress import ProgressDisplay
from labs.running.resolve import Setup
from loadtests import plan, records
from loadtests.generator import GeneratorError
from loadtests.records import RequestRecord
from loadtests.workload import Workload
from serving import guard
from serving.engines.base import EngineError
from serving.reference_step import ReferenceStep, ReferenceTimer
from serving.telemetry import Telemetry

PER_TRIAL_S = 2.0  # drain and bookkeeping, for the estimate of the time remaining


def requests_file(work: Path, workload: Workload, repeat: int) -> Path:
    return work / f"{workload.name}-{repeat}.jsonl"


def write_requests(setup: Setup, work: Path) -> str:
    """Write what each repeat sends, the same for all its variants and loads; return its SHA-256.

    Raises LabError where a workload cannot be written.
    """
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


def interleave(setup: Setup, group: Sequence[Variant]) -> list[tuple[Point, int]]:
    """Order trials by repeat, the points of each at random, so that drift hits all points alike."""
    rng = random.Random(f"{setup.lab.seed}/order")
    names = {v.name for v in group}
    points = [p for p in setup.points if p.variant.name in names]
    return [
        (point, repeat)
        for repeat in range(1, setup.lab.repeats + 1)
        for point in sorted(points, key=lambda _: rng.random())
    ]


def recorded(folder: RunFolder, point: Point, repeat: int) -> bool:
    """Tell whether this trial has succeeded, in this sitting or before."""
    result = folder.trial_result(point, repeat)
    return result is not None and result.failed is None


class Trials:
    """Plays trials on the engines, one after another, and records each."""

    def __init__(
        self,
        setup: Setup,
        folder: RunFolder,
        work: Path,
        engines: Engines,
        load: LoadGenerator,
        telemetry: Telemetry,
        counts: Counts,
        progress: ProgressDisplay,
        reference: ReferenceTimer | None = None,
    ) -> None:
        self.load_s = 0.0  # spent under load so far
        self._setup, self._folder, self._work, self._progress = setup, folder, work, progress
        self._engines, self._load = engines, load
        self._telemetry, self._counts = telemetry, counts
        self._reference = reference  # None beside an endpoint, which may be on another machine
        self._left = len(self.due(interleave(setup, setup.lab.variants)))

    def due(self, trials: Iterable[tuple[Point, int]]) -> list[tuple[Point, int]]:
        """Return those of these trials that have not succeeded yet."""
        return [trial for trial in trials if not recorded(self._folder, *trial)]

    @property
    def any_recorded(self) -> bool:
        """Tell whether any trial has succeeded, in this sitting or before."""
        trials = interleave(self._setup, self._setup.lab.variants)
        return any(recorded(self._folder, *trial) for trial in trials)

    def expect(self, count: int) -> None:
        """Set how many trials are still to come, beyond the lab's own repeats."""
        self._left = count

    @property
    def remaining_s(self) -> float:
        """Estimate how long the remaining trials take, each the mean over the points."""
        lab, points = self._setup.lab, self._setup.points
        warmup_s = sum(p.workload.warmup_s or lab.warmup_s for p in points) / len(points)
        return self._left * (warmup_s + lab.window_s + PER_TRIAL_S)

    def play(self, point: Point, repeat: int) -> None:
        """Play one trial and record it; a failure is recorded with its reason."""
        began, other_load = time.monotonic(), OtherLoad()
        of = max(repeat, self._setup.lab.repeats)
        name = f"{point.workload.name} {point.load}, repeat {repeat} of {of}"
        if len(self._setup.lab.variants) > 1:
            name = f"{point.variant.name} {name}"
        try:
            before = self._time_reference()
            summary, engine, rate = self._play(point, repeat, name)
            after = self._time_reference()
            steal_share, others_share = other_load.shares()
            result = TrialResult(
                point=point.key, repeat=repeat, summary=summary, engine=engine,
                cpu_steal=steal_share, cpu_others=others_share,
                reference_before=before, reference_after=after,
                took_s=round(time.monotonic() - began, 3),
            )  # fmt: skip
        except (EngineError, GeneratorError, OSError) as error:
            result = TrialResult(point=point.key, repeat=repeat, failed=str(error))
            rate = f"failed: {str(error).splitlines()[0]}"
        self._record(point, repeat, result)
        self._progress.trial_done(f"{name}: {rate}", self.remaining_s)

    def fail(self, trials: Iterable[tuple[Point, int]], reason: str) -> None:
        """Record these trials as failed, but for those that succeeded in an earlier sitting."""
        for point, repeat in self.due(trials):
            result = TrialResult(point=point.key, repeat=repeat, failed=reason)
            self._record(point, repeat, result)

    def _time_reference(self) -> ReferenceStep | None:
        """Time the machine itself; once that has failed the run goes on without."""
        if self._reference is None:
            return None
        step = self._reference.time()
        if step is None:
            why = self._reference.process.tail(1) or "its process ended"
            self._progress.message(f"The machine's own speed is no longer timed: {why}")
            self._reference = None
        return step

    def _record(self, point: Point, repeat: int, result: TrialResult) -> None:
        write_json(self._folder.trial_folder(point, repeat) / "trial.json", result)
        self._left -= 1

    def _play(
        self, point: Point, repeat: int, name: str
    ) -> tuple[plan.TrialSummary, dict[str, Any] | None, str]:
        lab = self._setup.lab
        engine = self._engines.serving(point.variant)
        engine.reset_prefix_cache()
        sending = requests_file(self._work, point.workload, repeat)
        if point.flags.enable_prefix_caching and point.workload.primed and point.workload.prefix:
            _prime(engine.url, sending, point.workload.prefix.groups, lab.timeout_s)
        before = engine.snapshot()
        path = self._folder.trial_folder(point, repeat) / "requests.jsonl.gz"
        trial_plan = plan.TrialPlan(
            url=engine.url,
            arrival=point.load,
            requests=sending,
            records=path,
            warmup_s=point.workload.warmup_s or lab.warmup_s,
            window_s=lab.window_s,
            timeout_s=lab.timeout_s,
            seed=lab.draw_seed(repeat),
            lab=lab.name,
            variant=point.variant.name,
            run_id=self._folder.path.name,
            workload=point.workload.name,
            keep_text=point.workload.keep_text,
            slo_s=lab.slo.by_name(),
        )
        began = time.monotonic()
        self._telemetry.begin(point.variant.name)
        try:
            summary = self._load.play(trial_plan, lambda: self._progress.waiting(name))
        except GeneratorError:
            self._counts.lose_prometheus()
            raise
        self._telemetry.write(path.with_name("telemetry.csv.gz"), summary.started_monotonic_s)
        self.load_s += time.monotonic() - began
        request_records = list(records.read(path))
        succeeded = [r for r in request_records if r.ok]
        if reason := engine.died() or summary.aborted or nothing_measured(request_records):
            self._counts.discard(succeeded)
            raise EngineError(reason)
        engine_counters = counter_increase(engine, before, len(succeeded))
        self._counts.add(succeeded, engine_counters)
        trial = Trial(point, repeat, lab.slo, request_records, summary, engine_counters)
        tokens_per_s = output_tokens_per_s(trial)
        rate = "nothing in the window" if tokens_per_s is None else f"{tokens_per_s:.0f} tok/s"
        return summary, None if engine_counters is None else snapshot_json(engine_counters), rate


def nothing_measured(request_records: Sequence[RequestRecord]) -> str:
    """Say why a trial has no figures: nothing sent in its window succeeded. Else return ""."""
    counted = [r for r in request_records if r.in_window]
    if any(r.ok for r in counted):
        return ""
    if not counted:
        return "nothing was sent in the window: lengthen it (window_s), or raise the load's rate"
    error = counted[0].error
    return f"no request in the window succeeded, of {len(counted)}; the first failed with: {error}"


def _prime(url: str, sending: Path, groups: int, timeout_s: float) -> None:
    """Have the engine prefill the first request of each prefix group, one after another."""
    for planned in plan.read_requests(sending)[:groups]:
        body = {**json.loads(planned.body), "max_tokens": 1, "stream": False}
        del body["stream_options"]
        response = requests.post(
            f"{url}/v1/chat/completions", json=body, headers=guard.headers(), timeout=timeout_s
        )
        response.raise_for_status()
