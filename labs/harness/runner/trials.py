"""Order the trials of a run, write what they send, and play and record each."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean

import psutil
import requests

from labs.harness.analysis.checks.expected import Expected
from labs.harness.analysis.measure import (
    OtherWork,
    Trial,
    output_tokens_per_s,
    ran_out,
    requests_per_s,
)
from labs.harness.analysis.text import number, point_label
from labs.harness.analysis.validity import check, disturbances_of, undisturbed_transport_s
from labs.harness.derived.design import transports_s
from labs.harness.forecast.request_counts import Counts, counted_since
from labs.harness.plan.progress import ProgressDisplay
from labs.harness.plan.resolve import Setup, requests_file
from labs.harness.plan.time_budget import MOST_AGAIN, MOST_AGAIN_QUICK, PER_TRIAL_S
from labs.harness.runner.engines import Engines
from labs.harness.runner.load import LoadGenerator
from labs.harness.runner.machine_load import OtherLoad, ServerLoad, wait_until_idle
from labs.harness.spec.lab import LabError, Point, Variant
from labs.harness.storage.recorded import Discarded, TrialResult, snapshot_json
from labs.harness.storage.results import FULL, RunFolder
from labs.harness.storage.writing import write_trial
from loadtests import plan, records
from loadtests.arrivals import Concurrent, OfCapacity
from loadtests.generator import GeneratorError
from loadtests.plan import TrialSummary
from loadtests.records import RequestRecord
from serving import metrics
from serving.engines.base import EngineError, Server
from serving.hardware.reference_step import ReferenceStep, ReferenceTimer
from serving.hardware.telemetry import Telemetry
from serving.metrics import Snapshot
from serving.plugins import guard
from serving.processes import masking

BESIDE = "of a trial beside it: "  # how a reason begins that is another trial's
REST_S = 0.25
"""In which an engine finishes what follows an answer's last token, before it is suspended: with
speculation it drafts once more. Suspended in the middle of that, vLLM 0.32 may answer the next
request 5 s late: a wake-up of its worker is lost, and it looks again after so long."""


def write_requests(
    setup: Setup, work: Path, progress: ProgressDisplay, repeats: Sequence[int] | None = None
) -> list[Path]:
    """Write what each repeat sends, the same for all its variants and loads; return the files.

    By default those of the lab's own `repeats`. Raises LabError where a workload cannot be written.
    """
    lab, files = setup.lab, list[Path]()
    repeats = range(1, lab.repeats + 1) if repeats is None else repeats
    served = setup.endpoint.model if setup.endpoint else setup.model.name
    wanted = [(workload, repeat) for workload in lab.workloads for repeat in repeats]
    for workload, repeat in wanted:
        left = len(wanted) - len(files)
        progress.waiting(f"writing the prompts: {left} of {len(wanted)} files left")
        count, seed = lab.requests_of(workload), lab.draw_seed(repeat)
        try:
            drawn = workload.requests(count, seed, setup.writer)
        except ValueError as error:
            raise LabError(f"workload {workload.name}: {error}") from error
        path = requests_file(work, workload, repeat)
        plan.write_requests(path, drawn, served)
        files.append(path)
    return files


def interleave(setup: Setup, group: Sequence[Variant]) -> list[tuple[Point, int]]:
    """Order trials by repeat, the points of each at random, so that drift hits all points alike.

    The very first is the one that finds the capacity, where loads are multiples of it.
    """
    rng = random.Random(f"{setup.lab.seed}/order")
    names = {v.name for v in group}
    points = [p for p in setup.points if p.variant.name in names]
    trials = [
        (point, repeat)
        for repeat in range(1, setup.lab.repeats + 1)
        for point in sorted(points, key=lambda _: rng.random())
        if repeat <= setup.lab.repeats_of(point)
    ]
    if not setup.lab.finds_capacity:
        return trials
    return sorted(trials, key=lambda trial: trial != (setup.points[0], 1))


def played_together(
    setup: Setup, group: Sequence[Variant], trials: Sequence[tuple[Point, int]]
) -> list[list[tuple[Point, int]]]:
    """Part trials, in their order, into those that are played together.

    Where engines stay loaded together on a CPU, the trials of a repeat that send one user's same
    requests to several of them are: each engine gets one request in turn. What the machine's speed
    does within seconds then meets all of them alike. Other loads keep an engine busy all the time,
    so that their trials come one after another.
    """
    lab, parts = setup.lab, dict[tuple[object, ...], list[tuple[Point, int]]]()
    resident = len(group) > 1 and setup.machine.kind == "cpu" and not lab.finds_capacity
    for point, repeat in trials:
        alone = point.load != Concurrent(users=1) or point.client_limits or not resident
        of = (point.key if alone else "", point.workload.name, repeat)
        parts.setdefault(of, []).append((point, repeat))
    return [*parts.values()]


def recorded(folder: RunFolder, point: Point, repeat: int) -> bool:
    """Tell whether this trial has succeeded, in this sitting or before."""
    result = folder.trial_result(point, repeat)
    return result is not None and result.failed is None


@dataclass(frozen=True)
class Played:
    """An attempt at a trial that has ended."""

    point: Point
    result: TrialResult
    rate: str  # for the display
    succeeded: Sequence[RequestRecord] = ()
    engine: Snapshot | None = None  # by how much its counters rose

    @classmethod
    def failed(cls, point: Point, repeat: int, error: Exception) -> Played:
        """Record a failure with its reason, without secrets."""
        why = masking.tellable(str(error))
        result = TrialResult(point=point.key, repeat=repeat, failed=why)
        return cls(point, result, f"failed: {why.splitlines()[0]}")


@contextlib.contextmanager
def _costing_its_own(point: Point, repeat: int, played: list[Played]) -> Iterator[None]:
    """Have an engine's failure cost its own trial, not those beside it.

    So does that of a request to it, as what `requests` raises is an OSError; a full disk ends all.
    """
    try:
        yield
    except (EngineError, OSError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        played.append(Played.failed(point, repeat, error))


@dataclass(frozen=True)
class Sending:
    """A trial that is about to be played: what is sent, and what the engine had counted before."""

    point: Point
    engine: Server
    plan: plan.TrialPlan
    before: Snapshot | None


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
        in_turn: bool = False,
    ) -> None:
        """Take what plays them; `in_turn` says that an engine is started more than once."""
        self.load_s = 0.0  # spent under load so far
        self.work = work  # the folder of what is sent
        self.starts_to_come = 0  # of engines, before the last of the remaining trials
        self.probes_to_come = 0
        self._setup, self._folder, self._progress = setup, folder, progress
        self._engines, self._load, self._in_turn = engines, load, in_turn
        self._telemetry, self._counts = telemetry, counts
        self._reference = reference  # None beside an endpoint, which may be on another machine
        forecasts = folder.predictions().in_virtual_time
        self._forecast_s = forecasts.trial_s if forecasts else {}
        self._left = len(self.due(interleave(setup, setup.lab.variants)))
        self._played = self._again = 0  # trials of this sitting; attempts that were discarded
        self._sent = Counter[str]()  # requests at each point, in all attempts at this trial
        self._took_s = 0.0  # all of them
        self._beside_s = PER_TRIAL_S  # the most that a trial took beside warm-up and window

    def due(self, trials: Iterable[tuple[Point, int]]) -> list[tuple[Point, int]]:
        """Return those of these trials that have not succeeded yet."""
        return [trial for trial in trials if not recorded(self._folder, *trial)]

    @property
    def any_recorded(self) -> bool:
        """Tell whether any trial has succeeded, in this sitting or before."""
        trials = interleave(self._setup, self._setup.lab.variants)
        return any(recorded(self._folder, *trial) for trial in trials)

    def take_turns(self) -> None:
        """Record from now on which start of its engine a trial was played on."""
        self._in_turn = True

    def expect(self, count: int) -> None:
        """Set how many trials are still to come, beyond the lab's own repeats."""
        self._left = count

    @property
    def remaining_s(self) -> float:
        """Estimate how long the remaining trials, engine starts between them and probes take.

        A start takes what those so far took in the mean, a probe what the longest so far took, and
        a trial the mean over the points.
        Once as many trials were played as there are points, it is what each of these took: windows
        that were held open and attempts that were measured again are in that. Until then the points
        to come are taken to need no second attempt.
        """
        points = self._setup.points
        beside_s = self.probes_to_come * self._setup.clock.probe_s
        if self.starts_to_come:
            beside_s += self.starts_to_come * self._engines.mean_start_s
        if self._played >= len(points):
            return beside_s + self._left * self._took_s / self._played
        planned_s = fmean(self._planned_s(point) for point in points)
        attempts_each = 1 + self._again / len(points)
        return beside_s + self._left * attempts_each * (planned_s + PER_TRIAL_S)

    def trial_s(self, *points: Point) -> float:
        """Estimate how long a trial of these points takes, no trial so far having taken longer."""
        return sum(self._planned_s(point) + self._beside_s for point in points)

    def _planned_s(self, point: Point) -> float:
        """Return the forecast from a trial's start to its last answer, or else its plan.

        On a slow machine a window is held open until enough requests count, and a benchmark of so
        many requests ends with them, which only the forecast knows.
        """
        lab, forecast_s = self._setup.lab, self._forecast_s.get(point.key, 0.0)
        if point.workload.trace and forecast_s:
            return forecast_s
        return max(lab.warmup_of(point.workload) + lab.window_s, forecast_s)

    def play(self, point: Point, repeat: int, beside: Sequence[Point] = ()) -> None:
        """Play one trial, with those beside it, and record each; a failure with its reason.

        A disturbed trial is measured again, at most twice, or once in a quick run on a CPU, and
        those beside it with it. Only the checks decide that, never a figure, and the last attempt
        counts, whatever they say of it.
        """
        lab, left = self._setup.lab, [point, *beside]
        most_again = MOST_AGAIN_QUICK if lab.decides else MOST_AGAIN
        of = max(repeat, lab.repeats_of(point))
        name = f"{self._labels(left)}, repeat {repeat} of {of}"
        discarded: dict[str, tuple[Discarded, ...]] = {each.key: () for each in left}
        ended, tries, began = list[Played](), 0, time.monotonic()
        self._sent.clear()
        while True:
            played = self._attempt(left, repeat, name)
            tries += 1
            self._setup.clock.played = True  # so that another attempt has to fit
            played = [self._after(p, discarded[p.point.key]) for p in played]
            ended += [p for p in played if p.result.failed]
            played = [p for p in played if not p.result.failed]
            attempts = self._disturbed(played)
            for p in played:
                beside_s = (p.result.took_s or 0) - self._planned_s(p.point)
                self._beside_s = max(self._beside_s, beside_s)
            if not attempts or tries > most_again or self._setup.keep_disturbed:
                break
            left = [p.point for p in played]
            if not self._setup.clock.fits(self.trial_s(*left)):
                self._progress.message(f"{name} was disturbed, but no time is left to repeat it")
                break
            for p in played:
                discarded[p.point.key] += (attempts[p.point.key],)
                self._counts.discard(p.succeeded)
            self._again += len(left)
            checks = sorted({check for attempt in attempts.values() for check in attempt.reasons})
            self._progress.message(
                f"{name}: measured again ({tries} of {most_again} times), disturbed by:"
                f" {', '.join(checks)}"
            )
        ended += played
        for p in ended:
            self._write(p.point, p.result)  # not before: an interrupted attempt is played anew
            if not p.result.failed:
                self._counts.add(p.succeeded, p.engine)
        self._played += len(ended)
        self._took_s += time.monotonic() - began
        self._left -= len(ended)
        rates = {p.point.key: p.rate for p in ended}
        in_order = " | ".join(rates[each.key] for each in (point, *beside))
        self._progress.part_done(f"{name}: {in_order}", self.remaining_s)

    def _labels(self, points: Sequence[Point]) -> str:
        """Name the points of trials that are played together: `off | on, 1 user`."""
        first, variants = points[0], " | ".join(point.variant.name for point in points)
        label = point_label(first.key, self._setup.lab)
        return label.replace(first.variant.name, variants, 1) if len(points) > 1 else label

    def _after(self, played: Played, discarded: tuple[Discarded, ...]) -> Played:
        """Note an attempt: how much was sent, and the attempts before it."""
        summary = played.result.summary
        self._sent[played.point.key] += summary.sent if summary else 0
        return replace(played, result=played.result.model_copy(update={"discarded": discarded}))

    def _attempt(self, points: Sequence[Point], repeat: int, name: str) -> list[Played]:
        """Play one attempt at a trial, and at those beside it."""
        began = time.monotonic()
        try:
            before = self._time_reference()
            with self._engines.others_suspended(point.variant for point in points):
                played = self._play(points, repeat, name, began)
        except (EngineError, GeneratorError, OSError) as error:
            return [Played.failed(point, repeat, error) for point in points]
        steps = {"reference_before": before, "reference_after": self._time_reference()}
        return [
            p if p.result.failed else replace(p, result=p.result.model_copy(update=steps))
            for p in played
        ]

    @cached_property
    def _expected(self) -> Expected:
        """What the run's trials must show."""
        return self._folder.run().expected(self._folder.predictions())

    @cached_property
    def _transports_s(self) -> dict[str, dict[tuple[str, int], float]]:
        """How long transport took by the rule of the report: on file, from where a run goes on."""
        return transports_s(self._folder, self._setup.points, self._setup.lab, self._expected)

    def _disturbed(self, played: Sequence[Played]) -> dict[str, Discarded]:
        """Say by point what disturbed an attempt, so that it is to be measured again.

        Empty where nothing did. Else it holds the trials beside those that were disturbed, too.
        """
        reasons = {p.point.key: self._reasons(p.point, p.result) for p in played}
        if not any(reasons.values()):
            return {}
        of_any = {name: text for of in reasons.values() for name, text in of.items()}
        return {
            p.point.key: Discarded(
                reasons=reasons[p.point.key]
                or {name: BESIDE + text for name, text in of_any.items()},
                loop_lag_max_s=p.result.summary.loop_lag_max_s if p.result.summary else None,
                cpu_steal=p.result.cpu_steal,
                cpu_others=p.result.cpu_others,
                cpu_engine=p.result.cpu_engine,
                took_s=p.result.took_s,
            )
            for p in played
        }

    def _reasons(self, point: Point, result: TrialResult) -> dict[str, str]:
        """Say what disturbed a trial, by the name of the check.

        Whatever allows no verdict does, and a large jump of the machine's speed, which allows one.
        """
        trial = self._folder.trial(point, result, self._setup.lab)
        if trial is None:
            return {}
        expected = self._expected.with_transport(self._transports_s)
        reasons = {c.name: c.text for c in disturbances_of(trial, expected) if c.blocks}
        jumps = check("speed-within", point.key, result.timed) if result.timed else []
        reasons |= {c.name: c.text for c in jumps}
        of_variant = self._transports_s.setdefault(point.variant.name, {})
        of_variant.pop((point.key, result.repeat), None)  # of an attempt that is not the last
        took_s = undisturbed_transport_s(trial, result.timed, self._expected)
        if took_s is not None:
            of_variant[point.key, result.repeat] = took_s
        return reasons

    def _requests_to_skip(self, point: Point) -> int:
        """Count the requests that another attempt must not send again.

        A structure that the engine is not to have seen is compiled, and cached, once it was sent.
        """
        structure = point.workload.structure
        return self._sent[point.key] if structure and structure.unseen else 0

    def fail(self, trials: Iterable[tuple[Point, int]], reason: str) -> None:
        """Record these trials as failed, but for those that succeeded in an earlier sitting."""
        why = masking.tellable(reason)
        for point, repeat in self.due(trials):
            self._write(point, TrialResult(point=point.key, repeat=repeat, failed=why))
            self._left -= 1

    def _time_reference(self) -> ReferenceStep | None:
        """Time the machine itself, beside idle engines; None once that has failed."""
        if self._reference is None:
            return None
        wait_until_idle(self._engines.pids)
        step = self._reference.time()
        if step is None:
            why = self._reference.process.tail(1) or "its process ended"
            self._progress.message(f"The machine's own speed is no longer timed: {why}")
            self._reference = None
        return step

    def _write(self, point: Point, result: TrialResult) -> None:
        write_trial(self._folder.trial_folder(point, result.repeat), result)

    def _play(self, points: Sequence[Point], repeat: int, name: str, began: float) -> list[Played]:
        """Play an attempt at these trials, which has begun at a time on the monotonic clock.

        An engine that fails costs its own trial. Raises GeneratorError.
        """
        sending, played = list[Sending](), list[Played]()
        for point in points:
            with _costing_its_own(point, repeat, played):
                sending.append(self._ready(point, repeat, len(points)))
        if not sending:
            return played
        summaries, other_work = self._send(sending, name)
        took_s = round((time.monotonic() - began) / len(sending), 3)
        succeeded = list[Played]()
        for each, summary in zip(sending, summaries, strict=True):
            with _costing_its_own(each.point, repeat, played):
                succeeded.append(self._ended(each, repeat, summary, other_work, took_s))
        keys = [p.point.key for p in succeeded]
        for p in succeeded:
            beside = {"beside": tuple(key for key in keys if key != p.point.key)}
            played.append(replace(p, result=p.result.model_copy(update=beside)))
        return played

    def _ready(self, point: Point, repeat: int, together: int) -> Sending:
        """Make an engine ready for a trial, one of so many together.

        Raises EngineError, and requests.RequestException where it does not do what it is asked.
        """
        engine = self._engines.serving(point.variant)
        trial_plan = self._trial_plan(point, repeat, engine, together)
        try:
            engine.reset_prefix_cache()
            if point.primed_requests:
                timeout_s = trial_plan.timeout_s
                _prime(engine.url, trial_plan.requests, point.primed_requests, timeout_s)
        except requests.RequestException as error:
            engine.stop()  # it may hang: the next trial gets another
            raise EngineError(f"{engine.name} cannot be made ready for a trial: {error}") from error
        return Sending(point, engine, trial_plan, engine.snapshot())

    def _ended(
        self,
        sent: Sending,
        repeat: int,
        summary: TrialSummary,
        other_work: OtherWork,
        took_s: float,
    ) -> Played:
        """Read what came of a trial. Raises EngineError and GeneratorError."""
        point, engine = sent.point, sent.engine
        request_records = self._read_records(sent.plan.records)
        succeeded = [r for r in request_records if r.ok]
        if (
            reason := engine.died()
            or summary.aborted
            or nothing_measured(request_records, ran_out(point, summary))
        ):
            if fell_silent(request_records):
                engine.stop()  # it hangs: the next trial gets another
            self._counts.discard(succeeded)
            raise EngineError(reason)
        engine_counters = counted_since(engine, sent.before, len(succeeded))
        slo = self._setup.lab.slo
        trial = Trial(point, repeat, slo, request_records, summary, engine_counters)
        tokens_per_s = output_tokens_per_s(trial)
        rate = "nothing in the window" if tokens_per_s is None else number(tokens_per_s, "tok/s")
        if engine_counters and (served := engine.served()):
            engine_counters.info[metrics.SERVED] = served
        result = TrialResult(
            point=point.key,
            repeat=repeat,
            summary=summary,
            engine=None if engine_counters is None else snapshot_json(engine_counters),
            start=self._engines.starts[point.variant.name] if self._in_turn else None,
            cpu_steal=other_work.steal_share,
            cpu_others=other_work.other_processes_share,
            cpu_engine=other_work.engine_share,
            server_core_share=other_work.server_core_share,
            gpu_others=other_work.gpu_processes,
            cpu_cores=other_work.cores,
            took_s=took_s,
        )
        return Played(point, result, rate, succeeded, engine_counters)

    def _trial_plan(
        self, point: Point, repeat: int, engine: Server, together: int
    ) -> plan.TrialPlan:
        """Plan what the load generator sends. Raises EngineError where a load has no rate.

        A trial of several together has as much time as all of them, in which others are served too.
        """
        lab, of_capacity = self._setup.lab, isinstance(point.load, OfCapacity)
        suspends = together > 1 and self._engines.share_cpu
        return plan.TrialPlan(
            url=engine.url,
            arrival=point.load,
            requests=requests_file(self.work, point.workload, repeat),
            skip=self._requests_to_skip(point),
            records=self._folder.trial_folder(point, repeat) / "requests.jsonl.gz",
            warmup_s=together * lab.warmup_of(point.workload),
            window_s=together * lab.window_s,
            timeout_s=lab.timeout_s,
            seed=lab.draw_seed(repeat),
            lab=lab.name,
            variant=point.variant.name,
            run_id=self._folder.path.name,
            workload=point.workload.name,
            unnamed=self._setup.blind,
            keep_text=point.workload.keep_text,
            capacity_per_s=self._capacity_per_s() if of_capacity else None,
            slo_s=lab.slo.by_name(),
            turns_away=point.flags.turns_away,
            admission=point.client_limits,
            turns=point.turns,
            fields=dict(engine.request_fields),
            model_names=dict(engine.model_names),
            reconnects=engine.closes_connections,
            pids=tuple(engine.computing()) if suspends else (),
            rest_s=REST_S if suspends else 0.0,
            secrets=masking.SECRETS,
        )

    def _send(self, sending: Sequence[Sending], name: str) -> tuple[list[TrialSummary], OtherWork]:
        """Have the load sent, and watch what else uses the machine. Raises GeneratorError.

        What one engine of several uses is not known: no energy, and no share of its API server.
        """
        first, *others = (each.plan for each in sending)
        pids = [pid for each in sending if (pid := each.engine.pid) is not None]
        began, other_load = time.monotonic(), OtherLoad(pids)
        server_load = ServerLoad(() if others else sending[0].engine.api_servers())

        def waiting() -> None:
            server_load.read()
            self._progress.waiting(name)

        self._telemetry.begin(first.variant, self._engines.started)
        try:
            together = first.model_copy(update={"beside": tuple(others)})
            summaries = self._load.play(together, waiting)
        except GeneratorError:
            self._counts.lose_prometheus()
            raise
        if not others:
            telemetry_file = first.records.with_name("telemetry.csv.gz")
            self._telemetry.write(telemetry_file, summaries[0].started_monotonic_s)
        self.load_s += time.monotonic() - began
        server_load.read()
        shares = other_load.shares()
        return summaries, OtherWork(
            shares.steal,
            shares.other_processes,
            shares.engine,
            self._telemetry.foreign_processes(),
            psutil.cpu_count(),
            _in_window(server_load, summaries[0]),
        )

    def _read_records(self, path: Path) -> list[RequestRecord]:
        """Read what the load generator recorded. Raises GeneratorError."""
        try:
            return records.read_all(path)
        except ValueError as error:
            self._counts.lose_prometheus()
            raise GeneratorError(f"its records cannot be read: {error}") from error

    def _capacity_per_s(self) -> float:
        """Read the requests/s of the lab's first point in its first repeat.

        Raises EngineError where that trial has failed, or completed nothing.
        """
        first, lab = self._setup.points[0], self._setup.lab
        result = self._folder.trial_result(first, 1)
        trial = self._folder.trial(first, result, lab) if result else None
        capacity_per_s = requests_per_s(trial) if trial else None
        if not capacity_per_s:
            why = (result and result.failed) or f"nothing was completed at {first.key}"
            raise EngineError(f"this load is a multiple of the capacity, which is not known: {why}")
        return capacity_per_s


def _in_window(server_load: ServerLoad, summary: TrialSummary) -> float | None:
    """Return the busiest API server's share of a core in the window; None where it is not known."""
    if summary.started_monotonic_s is None:
        return None
    start_s, end_s = (summary.started_monotonic_s + at for at in summary.window_s)
    return server_load.busiest(start_s, end_s)


def nothing_measured(request_records: Sequence[RequestRecord], exhausted: bool = False) -> str:
    """Say why a trial has no figures: nothing sent in its window succeeded. Else return ""."""
    counted = [r for r in request_records if r.in_window]
    if any(r.ok for r in counted):
        return ""
    if not counted and exhausted:
        return "the prepared requests ran out in the warm-up: raise `requests`"
    if not counted:
        return "nothing was sent in the window: raise `window_s` or the rate of the load"
    error = counted[0].error
    return f"no request in the window succeeded, of {len(counted)}; the first failed with: {error}"


def fell_silent(request_records: Iterable[RequestRecord]) -> bool:
    """Tell whether nothing at all came back for the last request that was sent."""
    last = max(request_records, key=lambda r: r.sent_s, default=None)
    return last is not None and not last.turned_away and last.first_byte_s is None


def _prime(url: str, sending: Path, groups: int, timeout_s: float) -> None:
    """Have the engine prefill the first request of each prefix group, one after another."""
    for planned in plan.read_requests(sending)[:groups]:
        body = {**json.loads(planned.body), "max_tokens": 1, "stream": False}
        del body["stream_options"]
        response = requests.post(
            f"{url}/v1/chat/completions", json=body, headers=guard.headers(), timeout=timeout_s
        )
        response.raise_for_status()
