"""Play the trials of a lab on virtual engines, and measure what their clients saw."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, geometric_mean, stdev

import scipy

from labs.harness.analysis import expected_treatment
from labs.harness.analysis.computed import Band, OnTwoEngines, ScaledDay
from labs.harness.analysis.measure import Trial, grows, in_time
from labs.harness.analysis.metrics import METRICS, measure
from labs.harness.analysis.signals import Watch, watch
from labs.harness.analysis.timeline import Timeline, timeline
from labs.harness.derived.lab_modules import AskedDay, Pair, ReportParts, parts_of
from labs.harness.forecast.copied_text import Copies
from labs.harness.forecast.forecaster import Forecaster
from labs.harness.forecast.step_timing import LEAST_OF_STAND_IN, Steps, served_folder
from labs.harness.plan.resolve import Setup
from labs.harness.spec.lab import Lab, Point
from loadtests.arrivals import Capped, Contended, Offered, OfSessions, OfTrace, Waves, send_times
from loadtests.plan import LEAST_COUNTED, QueueLimits, TrialSummary, most_held_open_s, read_requests
from loadtests.prompts import Writer
from loadtests.records import TURNED_AWAY, Chunks, RequestRecord
from serving import metrics
from serving.engines.flags import FlagValue, with_places
from serving.engines.vllm import Vllm, usable_bytes
from serving.engines.vllm_flags import VllmFlags
from serving.hardware.machine import Machine
from serving.metrics import KvUse, Snapshot
from serving.models.catalog import Shape
from serving.simulator import cards
from serving.simulator.fleet import Handover, Routing
from serving.simulator.protocol import (
    ForecastPlan,
    ForecastPlay,
    PlannedEngine,
    PlannedTrial,
    SyntheticRequest,
)
from serving.simulator.traffic import Delays, Play, Prompt, Traffic

PLAYS_OF_CHANCE = 9  # at least, where long prompts meet streams that are all alike
MOST_DRAWN = 1000  # requests of a trial whose copied text is drawn
Figures = dict[str, float | None]  # of a play, by metric
Capacities = Sequence[float | None]
"""The requests/s that are served at the expected, a faster and a slower step; None: unknown."""
NO_CAPACITIES: Capacities = (None, None, None)
FIRST = [(1, 1.0)]  # the only play at an end of the band, or at all: the first repeat
BY_LOAD = Routing(rule="least-loaded")  # of requests to two engines that both do all

PLAYED_AS = {
    "round_robin": "round-robin", "power_of_two": "least-loaded", "cache_aware": "prefix-aware",
}  # fmt: skip
"""The router's policy -> the rule that plays it. Of two replicas both are always drawn by its
power of two, which of more of them are is chance."""


def routing_of(flags: VllmFlags) -> Routing | None:
    """Return the rule by which the engine's router sends requests; None where it has no router.

    Its limits are by default those of sglang-router 0.3.2.

    Raises KeyError for a policy that is not played.
    """
    if not (router := flags.router):
        return None
    return Routing(
        rule=PLAYED_AS[str(router["policy"])],
        imbalance_requests=int(str(router.get("balance-abs-threshold", 64))),
        imbalance_ratio=float(str(router.get("balance-rel-threshold", 1.5))),
    )


def write_prompts(requests: Mapping[str, Sequence[Path]], writer: Writer) -> dict[str, list[Path]]:
    """Write what is sent as the tokens that a scheduler takes, a file beside each of `requests`."""
    prompts: dict[str, list[Path]] = {}
    for workload, files in requests.items():
        for file in files:
            of_file = file.with_suffix(".prompts")
            with of_file.open("w") as lines:
                for request in read_requests(file):
                    body = json.loads(request.body)
                    prompt = Prompt(
                        index=request.index,
                        token_ids=tuple(map(int, writer.tokens(body["messages"]))),
                        output_tokens=request.output_tokens,
                        adapter=request.adapter,
                        priority=body.get("priority", 0),
                        salt=body.get("cache_salt"),
                        intruder=request.intruder,
                        choices=request.choices,
                    )
                    lines.write(f"{prompt.model_dump_json()}\n")
            prompts.setdefault(workload, []).append(of_file)
    return prompts


@dataclass(frozen=True)
class VirtualTrials:
    """Plays the trials of a lab on virtual engines, and measures what their clients saw."""

    setup: Setup
    prompts: Mapping[str, Sequence[Path]]  # workload -> what is sent in each repeat, as `Prompt`s
    steps: Steps
    copies: Copies
    spread: float  # the usual one of the machine's speed, a factor of 1 or more
    forecaster: Forecaster

    def capacities_per_s(self, point: Point) -> Capacities:
        """Find the requests/s that the first trial of a point serves. Raises ForecastError."""
        (plays,) = self.played([point], NO_CAPACITIES)
        return [play.figures["requests_per_s"] for play in (plays.as_timed[0], *plays.shifted)]

    def figures(self, points: Sequence[Point], capacity_per_s: float | None) -> list[Figures]:
        """Play each of these points once, at the expected step; return what each play came to.

        Raises ForecastError.
        """
        engines = [self._engine(p, 0, FIRST, [capacity_per_s]) for p in points]
        plays = self._play(engines)
        return [measure(self._trial(p, play)) for p, play in zip(points, plays, strict=True)]

    def played(self, points: Sequence[Point], capacities: Capacities) -> list[PointPlays]:
        """Play all repeats of these points at the expected step, and the first at both ends.

        Loads may be multiples of the capacities. Raises ForecastError.
        """
        known = {p.key: p for p in points}
        lab, outcomes = self.setup.lab, {key: list[Outcome]() for key in known}
        parts = parts_of(lab.name) if lab.findings or lab.plots else ReportParts()
        over_time, watched = (
            {p.key for p in of(points)} for of in (parts.over_time, parts.watched)
        )
        timelines: dict[str, Timeline] = {}  # of each point's first play
        factors = {p.key: self._factors(p) for p in points}
        shifted = {key: list[Outcome]() for key in known}
        apart = [p for p in points if not factors[p.key]]
        engines = [
            *(self._engine(p, 0, self._repeats(p), capacities) for p in points),
            *(self._engine(p, end, FIRST, capacities) for end in (1, 2) for p in apart),
        ]
        for play in self._play(engines):
            trial = self._trial(known[play.key], play)
            if play.key in over_time - timelines.keys():
                timelines[play.key] = timeline(trial.point, trial.records)
            if not outcomes[play.key]:  # the first
                plays = [slowed(play, factor) for factor in factors[play.key]]
                shifted[play.key] += [Outcome.of(self._trial(trial.point, p), p) for p in plays]
            outcomes[play.key].append(Outcome.of(trial, play, play.key in watched))
        return [
            PointPlays.of(p, [*outcomes[p.key], *shifted[p.key]], timelines.get(p.key))
            for p in points
        ]

    def _factors(self, point: Point) -> Sequence[float]:
        """Return by what factors all times of a play differ at the two ends of the band.

        None where something keeps its own time there: a schedule, a gap, or a part of the step.
        One whose rate is a multiple of the capacity has none, as that differs by the factor, too.
        """
        load = point.load
        scheduled = load.open_loop and not isinstance(load, Offered)
        if scheduled or isinstance(load, Contended | OfSessions) or self.setup.lab.masking:
            return ()
        (expected, drafting), *ends = self.steps[point.key]
        factors = []
        for step, draft in ends:
            factor = step.factor_over(expected)
            of_draft = draft.factor_over(drafting) if draft and drafting else factor
            if not factor or not of_draft or not math.isclose(factor, of_draft):
                return ()
            factors.append(factor)
        return factors

    def of_a_fleet(self, point: Point, replicas: int, router: str) -> list[ForecastPlan]:
        """Plan the first trial of a point on several of its engines, at each end of the band.

        Of each answer only both ends are kept, as there may be a hundred thousand.
        """
        engines = [self._engine(point, end, FIRST, NO_CAPACITIES) for end in (0, 1, 2)]
        return [
            ForecastPlan(
                delays=self._delays.of_servers(replicas),
                engines=(_behind_a_router(engine, replicas, Routing(rule=router), ends_only=True),),
            )
            for engine in engines
        ]

    def on_two_engines(self, pairs: Sequence[Pair]) -> tuple[OnTwoEngines, ...]:
        """Play the loads of points on two engines each. Raises ForecastError.

        The second engine is on a machine as fast as the first.
        """
        forecasts = []
        for pair in pairs:
            # every request of a split pair comes to its first engine
            servers = 2 if pair.link_gbit_per_s is None else 1
            plays = self._play([self._pair(pair, end) for end in (0, 1, 2)], servers)
            outcomes = [Outcome.of(self._trial(pair.point, play), play) for play in plays]
            bands = PointPlays.of(pair.point, outcomes).bands(self.setup.lab)
            forecasts.append(
                OnTwoEngines(
                    point=pair.point.key,
                    link_gbit_per_s=pair.link_gbit_per_s,
                    bands={m: band for m, band in bands.items() if METRICS[m].forecast == "shown"},
                )
            )
        return tuple(forecasts)

    @property
    def _delays(self) -> Delays:
        return cards.DELAYS if self.setup.datasheet else Delays()

    def _play(self, engines: Sequence[PlannedEngine], servers: int = 1) -> Iterator[ForecastPlay]:
        delays = self._delays.of_servers(servers)
        self.forecaster.send(ForecastPlan(delays=delays, engines=tuple(engines)))
        return self.forecaster.plays()

    def _trial(self, point: Point, play: ForecastPlay) -> Trial:
        """Present a play as a finished trial, so that the same functions measure it."""
        slo, observed = self.setup.lab.slo, list(records(play.play))
        return Trial(point, play.repeat, slo, observed, _summary(play.play), _snapshot(play))

    def days(self, asked: Sequence[AskedDay], capacity_per_s: float) -> tuple[ScaledDay, ...]:
        """Play each of these days once, at the expected step. Raises ForecastError."""
        days = [*asked]
        engines = [self._following(day, capacity_per_s) for day in days]
        plays = self._play(engines, max((day.most for day in days), default=1))
        played = []
        for day, play in zip(days, plays, strict=True):
            assert play.replicas is not None
            observed = [*records(play.play)]
            played.append(
                ScaledDay(
                    name=day.name,
                    start_s=day.scaling.start_s,
                    requests=len(observed),
                    late=1 - fmean(in_time(record, self.setup.lab.slo) for record in observed),
                    replicas=play.replicas,
                )
            )
        return tuple(played)

    def _following(self, asked: AskedDay, capacity_per_s: float) -> PlannedEngine:
        """Plan engines whose number follows a day of a point's requests, all of the mean length."""
        point, seed = asked.point, self.setup.lab.seed
        schedule_s = asked.day.schedule(asked.length_s, random.Random(seed), capacity_per_s)
        file = self.prompts[point.workload.name][0].with_suffix(f".day-{len(schedule_s)}")
        with file.open("w") as lines:
            for index in range(len(schedule_s)):
                request = SyntheticRequest(
                    index=index,
                    prompt_tokens=round(point.prompt_tokens),
                    output_tokens=round(point.output_tokens),
                )
                lines.write(f"{request.model_dump_json()}\n")
        trial = PlannedTrial(
            key=point.key,
            repeat=1,
            requests=file,
            traffic=Traffic(
                kind="open", schedule_s=tuple(schedule_s), warmup_s=0, window_s=asked.length_s
            ),
            routing=BY_LOAD,
            scaling=asked.scaling,
            ends_only=True,
        )
        engine = self._engine(point, 0, (), NO_CAPACITIES)
        return engine.model_copy(update={"replicas": asked.most, "trials": (trial,)})

    def _pair(self, pair: Pair, end: int) -> PlannedEngine:
        """Plan two engines at this end of the band: a split pair, or both behind a router."""
        point = pair.point
        engine = self._engine(point, end, FIRST if end else self._repeats(point), NO_CAPACITIES)
        if pair.link_gbit_per_s is None:
            return _behind_a_router(engine, 2, BY_LOAD)
        delays = self._delays  # an answer comes to whoever sent the prompt, who asks once more
        handover = Handover(
            bytes_per_token=point.shape.kv_bytes_per_token(point.flags.kv_value_bytes),
            link_bytes_per_s=pair.link_gbit_per_s * 1e9 / 8,
            asked_s=delays.response_s + delays.request_s,
        )
        return engine.model_copy(update={"handover": handover})

    def _repeats(self, point: Point) -> list[tuple[int, float]]:
        """List the plays at the expected step: a repeat, and a factor on its step.

        Where long prompts come beside streams, no two plays have the same speed: see `paces`.
        """
        repeats = self.setup.lab.repeats
        if repeats == 1 or not isinstance(point.load, Contended):
            return [(repeat, 1.0) for repeat in range(1, repeats + 1)]
        speeds = paces(max(repeats, PLAYS_OF_CHANCE), self.spread / LEAST_OF_STAND_IN)
        return [(1 + i % repeats, pace) for i, pace in enumerate(speeds)]

    def _engine(
        self,
        point: Point,
        end: int,
        plays: Sequence[tuple[int, float]],
        capacities: Capacities,
    ) -> PlannedEngine:
        """Plan an engine with the step at this end of the band: 0 is the expected one."""
        setup = self.setup
        step_times, draft_times = self.steps[point.key][end]
        flags = with_places(point.engine_flags, setup.places)
        if setup.elsewhere and setup.machine.kind == "gpu":
            defaults = defaults_on_a_gpu(setup.machine, point.shape, point.engine_flags)
            flags = as_one_gpu({**defaults, **flags})
        planned = PlannedEngine(
            argv=(
                *Vllm.model_argv(served_folder(setup, point.variant)),
                *(("--load-format", "dummy") if setup.model.dummy else ()),
                *Vllm.flag_argv(flags),
            ),
            step_times=step_times,
            draft_times=draft_times,
            on_cuda=setup.machine.kind == "gpu",
            trials=tuple(
                self._planned(point, repeat, pace, capacities[end]) for repeat, pace in plays
            ),
        )
        routing = routing_of(point.flags)
        return _behind_a_router(planned, point.flags.replicas, routing) if routing else planned

    def _planned(
        self, point: Point, repeat: int, pace: float, capacity_per_s: float | None
    ) -> PlannedTrial:
        lab, key = self.setup.lab, point.key
        speculates = bool(point.flags.speculative_config)
        return PlannedTrial(
            key=key,
            repeat=repeat,
            requests=self.prompts[point.workload.name][repeat - 1],
            acceptance=lab.acceptance(point) if lab.acceptance and speculates else 0.0,
            guessed=lab.guessed(point) if lab.guessed and speculates else 1.0,
            copied=tuple(self.copies[key][repeat - 1]) if key in self.copies else (),
            pace=pace,
            masking=lab.masking(point) if lab.masking else None,
            primed=point.primed_requests,
            traffic=_traffic(lab, point, repeat, capacity_per_s),
        )


def _behind_a_router(
    engine: PlannedEngine, replicas: int, routing: Routing, ends_only: bool = False
) -> PlannedEngine:
    """Plan so many of an engine behind a router.

    Each engine holds its own limits on the queue. Where the load generator holds them instead, it
    does not know which engine has a request: all together may have as many as the limits of so many
    engines add up to.
    """
    trials = []
    for trial in engine.trials:
        most, most_tokens = trial.traffic.most_requests, trial.traffic.most_prompt_tokens
        limits = {
            "most_requests": most and replicas * most,
            "most_prompt_tokens": most_tokens and replicas * most_tokens,
        }
        traffic = trial.traffic.model_copy(update=limits)
        changes = {"routing": routing, "ends_only": ends_only, "traffic": traffic}
        trials.append(trial.model_copy(update=changes))
    return engine.model_copy(update={"replicas": replicas, "trials": tuple(trials)})


def paces(plays: int, spread: float) -> list[float]:
    """Spread factors on a step's time evenly within 1 / spread and spread; the first is 1.

    Streams whose requests are all alike send their next prompts together, and a long prompt comes
    every so often. Which of the two comes first decides whether the streams wait for seconds, and
    depends on the exact speed of a step, which is not known that well. A single play would show
    only one of the two outcomes.
    """
    places = [(i + 1) // 2 * (-1) ** i for i in range(plays)]  # 0, -1, 1, -2, 2 ..
    if plays % 2 == 0:
        places[-1] = 0  # which has no counterpart
    return [spread ** (2 * place / plays) for place in places]


def defaults_on_a_gpu(machine: Machine, shape: Shape, flags: Mapping[str, FlagValue]) -> VllmFlags:
    """Return the defaults that vLLM 0.32 takes from the GPU, as an API server, and a CPU has not.

    Source: `get_batch_defaults` of vllm/engine/arg_utils.py; a block of 16 tokens is the default of
    the attention kernels on Hopper and Ampere. The KV cache has what the weights leave of the
    memory, which is less than nothing for a model that does not fit.
    """
    large = machine.memory_bytes >= 70 * 2**30 and "A100" not in machine.model
    budget = VllmFlags(
        {"max-num-batched-tokens": 8192 if large else 2048, **flags}
    ).max_num_batched_tokens
    weight_bytes = shape.held_bytes / VllmFlags(flags).weight_parts
    return VllmFlags(
        {
            "max-num-batched-tokens": budget,
            "max-num-seqs": min(1024 if large else 256, budget),
            "block-size": 16,
            "kv-cache-memory-bytes": int(usable_bytes(machine.memory_bytes) - weight_bytes),
        }
    )


def as_one_gpu(flags: Mapping[str, FlagValue]) -> VllmFlags:
    """Return the flags of one GPU that holds what several hold that share each layer.

    To the scheduler their KV cache is one: each of them holds its heads of every token.
    """
    shared = VllmFlags(flags)
    rest = {name: flag for name, flag in flags.items() if name != "tensor-parallel-size"}
    memory_bytes = shared.tensor_parallel_size * shared.kv_cache_memory_bytes
    return VllmFlags({**rest, "kv-cache-memory-bytes": memory_bytes})


def _traffic(lab: Lab, point: Point, repeat: int, capacity_per_s: float | None) -> Traffic:
    """Describe a load for the virtual clients; the schedule is the one that will be sent.

    Where it is a multiple of the capacity, it is one of the capacity that was forecast.
    """
    load = point.load
    warmup_s, window_s = lab.warmup_of(point.workload), lab.window_s
    if isinstance(load, OfTrace):
        schedule_s: Sequence[float] = [at / load.speed for at, _, _ in point.workload.trace]
        window_s = max(1e-9, min(window_s, schedule_s[-1] - warmup_s))  # it ends with the trace
    else:
        duration_s, seed = warmup_s + lab.window_s, lab.draw_seed(repeat)
        schedule_s = send_times(load, duration_s, seed, capacity_per_s) or ()
    limits = point.client_limits or QueueLimits()
    begins_s = [*map(load.begins_s, range(load.users))] if isinstance(load, OfSessions) else []
    return Traffic(
        kind="waves" if isinstance(load, Waves) else "open" if load.open_loop else "closed",
        users=load.users,
        begins_s=tuple(begins_s),
        gaps_s=load.gaps_s if isinstance(load, OfSessions) else (0.0,),
        turns=point.turns,
        schedule_s=tuple(t for t in schedule_s if t < warmup_s + lab.window_s),
        most_in_flight=load.users if isinstance(load, Capped) else None,
        intruder_every_s=load.every_s if isinstance(load, Contended) else None,
        warmup_s=warmup_s,
        window_s=window_s,
        least_counted=LEAST_COUNTED,
        least_intruders=LEAST_COUNTED,
        most_held_open_s=most_held_open_s(lab.window_s),
        most_requests=limits.requests,
        most_prompt_tokens=limits.prompt_tokens,
    )


def slowed(play: ForecastPlay, factor: float) -> ForecastPlay:
    """Return a play in which everything takes `factor` times as long: steps, delays, its window.

    Where nothing else has a time of its own the scheduler does the same.
    """
    of = play.play
    answers = [
        replace(
            answer,
            scheduled_s=answer.scheduled_s and factor * answer.scheduled_s,
            sent_s=factor * answer.sent_s,
            chunks=[(factor * at_s, tokens) for at_s, tokens in answer.chunks],
            turned_away_s=answer.turned_away_s and factor * answer.turned_away_s,
        )
        for answer in of.answers
    ]
    start_s, end_s = of.window_s
    window_s = (factor * start_s, factor * end_s)
    update = {"play": of.model_copy(update={"answers": answers, "window_s": window_s})}
    return play.model_copy(update=update)


def records(play: Play) -> Iterator[RequestRecord]:
    """Present what the clients of a play observed as the records of a trial."""
    for a in play.answers:
        yield RequestRecord(
            index=a.index,
            asked_tokens=a.asked_tokens,
            scheduled_s=a.scheduled_s,
            sent_s=a.sent_s,
            chunks=Chunks(a.chunks),
            end_s=a.chunks[-1][0] if a.chunks else a.turned_away_s,
            prompt_tokens=a.prompt_tokens,
            output_tokens=sum(tokens for _, tokens in a.chunks),
            in_window=a.in_window,
            error=None if a.turned_away_s is None else TURNED_AWAY[0],
            choice=a.choice,
        )


def _summary(play: Play) -> TrialSummary:
    return TrialSummary(
        started_unix_s=0, window_s=play.window_s, answered_under_load=play.answered_under_load,
        planned=None, sent=len(play.answers),
        exhausted=False, loop_lag_p99_s=0, loop_lag_max_s=0, cpu_s=0,
    )  # fmt: skip


def _snapshot(forecast_play: ForecastPlay) -> Snapshot:
    """Present what the engine would have counted under the names of its metrics."""
    counted = forecast_play.counters
    return Snapshot(
        values={
            metrics.PREFIX_QUERIES: counted.get("prefix_queries", 0),
            metrics.PREFIX_HITS: counted.get("prefix_hits", 0),
            metrics.PREEMPTIONS: counted.get("preemptions", 0),
            metrics.TURNED_AWAY: counted.get("turned_away", 0),
            **(
                {
                    metrics.SPEC_DRAFTS: counted["drafts"],
                    metrics.SPEC_DRAFTED: counted["draft_tokens"],
                    metrics.SPEC_ACCEPTED: counted["accepted_tokens"],
                }
                if "drafts" in counted
                else {}
            ),
        },
        info={
            metrics.CACHE_CONFIG: {
                "num_gpu_blocks": str(forecast_play.kv_capacity_tokens), "block_size": "1",
            }
        },
    )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Holds what a play came to."""

    figures: Figures
    lasts_s: float  # until its last answer ended
    sent: int  # requests
    watch: Watch | None  # where its load is watched
    kv_use: KvUse | None
    grows: bool  # TTFT does with the length of the run
    # in the prefix cache after each request, where chance decides how much is found
    found_tokens: Sequence[int]

    @classmethod
    def of(cls, trial: Trial, play: ForecastPlay, watched: bool = False) -> Outcome:
        return cls(
            figures=measure(trial),
            lasts_s=max((r.end_s or 0.0 for r in trial.records), default=0.0),
            sent=len(trial.records),
            watch=watch(trial) if watched else None,
            kv_use=play.kv_use,
            grows=trial.point.load.open_loop and grows(trial.records),
            found_tokens=play.found_tokens if expected_treatment.by_chance(trial) else (),
        )


@dataclass(frozen=True)
class PointPlays:
    """Holds what all plays of a point came to."""

    point: Point
    as_timed: Sequence[Outcome]  # at the expected step
    shifted: Sequence[Outcome]  # the first, at the two ends of the band of its step
    timeline: Timeline | None  # of the first, where the lab's plots show it

    @classmethod
    def of(
        cls, point: Point, plays: Sequence[Outcome], of_first: Timeline | None = None
    ) -> PointPlays:
        """Gather the plays of a point, of which the last two are at the ends of the band."""
        return cls(point, plays[:-2], plays[-2:], of_first)

    @property
    def trial_s(self) -> float:
        """The mean time until the last answer of a trial has ended."""
        return fmean(play.lasts_s for play in self.as_timed)

    @property
    def fewest_sent(self) -> int:
        """The requests of the play that sent fewest, and at most as many as are drawn."""
        return min(MOST_DRAWN, *(play.sent for play in (*self.as_timed, *self.shifted)))

    @property
    def least_found(self) -> tuple[int, ...]:
        """The fewest tokens that any play has found in the prefix cache after each request."""
        return tuple(
            min(found) for found in zip(*(p.found_tokens for p in self.as_timed), strict=False)
        )

    @property
    def watches(self) -> tuple[Watch, ...]:
        return tuple(play.watch for play in self.as_timed if play.watch)

    @property
    def kv_uses(self) -> list[KvUse]:
        return [play.kv_use for play in self.as_timed if play.kv_use]

    def bands(self, lab: Lab) -> dict[str, Band]:
        """Return the band of each metric in which the mean of the lab's trials is expected."""
        names = [name for name, metric in METRICS.items() if metric.forecast]
        return self._bands(lab, names, lambda play: play.figures)

    def kv_bands(self, lab: Lab) -> dict[str, Band]:
        """Return the bands of the mean and the peak share of the KV cache in use, if it is known.

        What a faster and a slower step, and chance, change is found as for any other figure.
        """
        names = [*KvUse.model_fields]
        return self._bands(lab, names, lambda p: p.kv_use.model_dump() if p.kv_use else {})

    def _bands(
        self,
        lab: Lab,
        names: Iterable[str],
        figures: Callable[[Outcome], Mapping[str, float | None]],
    ) -> dict[str, Band]:
        as_timed, shifted = [*map(figures, self.as_timed)], [*map(figures, self.shifted)]
        return _bands(as_timed, shifted, self._repeats(lab), names)

    def _repeats(self, lab: Lab) -> int:
        """Count the trials that are independent: those beside long prompts share their speed."""
        return 1 if isinstance(self.point.load, Contended) else lab.repeats_of(self.point)


def _bands(
    as_timed: Sequence[Mapping[str, float | None]],
    shifted: Sequence[Mapping[str, float | None]],
    repeats: int,
    names: Iterable[str],
) -> dict[str, Band]:
    """Take each figure's mean over plays, how far another step shifts it, and what chance adds.

    `as_timed` holds the figures of each play, `shifted` those of the first at the two ends of the
    band of its step. `repeats` independent trials will be measured. Their mean differs by chance
    from that of the plays, by as much as these differ from one another: the band holds that with
    80%, and no end of it lies beyond all plays.
    """
    bands = {}
    for name in names:
        values = [v for row in as_timed if (v := row.get(name)) is not None]
        if not values:
            continue
        value, first = fmean(values), as_timed[0].get(name)
        ends = [v for row in shifted if (v := row.get(name)) is not None]
        shifts = [v - first for v in ends if first is not None]
        chance = by_chance(values, repeats)
        below, above = (math.hypot(f(0.0, *shifts, 0.0), chance) for f in (min, max))
        bands[name] = Band(
            value=value,
            low=min(value, max(value - below, min(*values, *ends, value))),
            high=max(value, min(value + above, max(*values, *ends, value))),
            geometric_mean=geometric_mean(values) if min(values) > 0 else None,
        )
    return bands


def by_chance(values: Sequence[float], repeats: int) -> float:
    """Tell how far the mean of so many trials lies from that of these plays, with 80%."""
    if len(values) < 2:
        return 0.0
    error = stdev(values) * math.sqrt(1 / len(values) + 1 / repeats)
    return error * float(scipy.stats.t.ppf(0.9, len(values) - 1))
