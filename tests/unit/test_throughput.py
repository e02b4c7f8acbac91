"""Rates of closed loops: by hand, on engines whose throughput is known, and as both clients play.

The engines here have a law: a step takes a constant, so much a sequence and so much a token of new
prompts. Played for hundreds of cycles they have one throughput, whatever is counted; a trial lasts
a few cycles.
"""

from __future__ import annotations

import functools
import json
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from labs.harness.analysis.measure import (
    Trial,
    batch,
    beale_correction,
    goodput_per_s,
    mfu,
    output_tokens_per_s,
    requests_per_s,
)
from labs.harness.spec import theory
from labs.harness.spec.lab import Point
from loadtests import plan
from loadtests.arrivals import (
    Arrival,
    Concurrent,
    Contended,
    LogNormal,
    Sessions,
    Waves,
)
from loadtests.plan import LEAST_COUNTED
from loadtests.records import RequestRecord
from loadtests.workload import Intruder, Request, intrudes
from serving.simulator.traffic import Play, Prompt, Traffic, play
from tests.unit.builders import CEILINGS, SHAPE, make_point, make_record, make_trial
from tests.unit.test_forecasting import NONE, Server

ROOT = Path(__file__).resolve().parents[2]

# ------------------------------------------------------------------------------------------ by hand

TWO = make_point(load="concurrent:2")
# two users, the window from 10 to 13 s: cycles of 2 s, then one of 1 s once the other has stopped
WARM_UP = make_record([(9.0, 1), (10.5, 3)], sent_s=8.5, in_window=False)
CYCLES = [
    make_record([(11.0, 1), (12.5, 3)], sent_s=10.5),
    make_record([(11.5, 1), (13.0, 3)], sent_s=11.0),
    make_record([(13.0, 1), (14.5, 3)], sent_s=12.5),
]
UNCOUNTED = make_record([(13.5, 1), (15.0, 3)], sent_s=13.0, in_window=False)


def test_a_rate_is_users_times_amount_over_complete_cycles() -> None:
    failed = make_record([], sent_s=13.0, end_s=15.0)  # its time is a user's time, too
    records = [WARM_UP, *CYCLES, failed, UNCOUNTED]
    trial = make_trial(records, point=TWO, window_s=(10, 13), answered_under_load=True)
    assert output_tokens_per_s(trial) == pytest.approx(2 * 12 / 8)
    assert requests_per_s(trial) == pytest.approx(2 * 3 / 8)
    assert batch(trial) == pytest.approx(2 * 3 * 1.5 / 8)
    assert goodput_per_s(trial) == 0  # the first token takes half a second
    flop = theory.prefill_flops(SHAPE, 4) + 3 * theory.decode_flops(SHAPE, 1, 8)
    assert mfu(trial) == pytest.approx(2 * 3 * flop / 8 / CEILINGS.bf16_flops_per_s)


def test_users_whose_load_process_died_do_not_count() -> None:
    records = [WARM_UP, *CYCLES, UNCOUNTED]
    trial = make_trial(records, point=TWO, answered_under_load=True, lost_share=0.5)
    assert output_tokens_per_s(trial) == pytest.approx(1 * 12 / 6)


def test_where_the_load_ended_early_tokens_count_as_they_arrive_until_a_user_stops() -> None:
    """The last was sent at 12.5 s: from 13 s, when nothing follows an answer, users are missing."""
    trial = make_trial([WARM_UP, *CYCLES], point=TWO, window_s=(10, 14))
    assert output_tokens_per_s(trial) == pytest.approx((3 + 4 + 1) / 3)
    assert requests_per_s(trial) == pytest.approx((3 + 4 + 1) / 3 / 4)  # of four tokens each
    assert batch(trial) == pytest.approx((0.5 + 1.5 + 1.5) / 3)


def test_users_who_stop_together_leave_complete_cycles() -> None:
    pair = [make_record([(11.0, 1), (12.5, 3)], sent_s=10.5), make_record([(12.505, 4)], sent_s=11)]
    trial = make_trial([WARM_UP, *pair], point=TWO, window_s=(10, 12))
    assert output_tokens_per_s(trial) == pytest.approx(2 * 8 / 3.505)


def test_an_intruder_is_no_stream() -> None:
    contended = make_point(load="contended:2/3", intruder=Intruder(prompt_tokens=96))
    visit = make_record([(14.0, 1)], index=3, sent_s=11.0)
    trial = make_trial(
        [*CYCLES, visit], point=contended, window_s=(10, 13), answered_under_load=True
    )
    assert output_tokens_per_s(trial) == pytest.approx(2 * 12 / 6)


def test_waves_are_counted_whole() -> None:
    wave = [make_record([(12.0, 1), (end_s, 3)], sent_s=10.0) for end_s in (12.5, 18.0)]
    waves = make_point(load="waves:2")
    warm_up = make_record([(9.0, 1), (10.0, 9)], sent_s=8.0, in_window=False)
    trial = make_trial([warm_up, *wave], point=waves, window_s=(10, 18))
    assert output_tokens_per_s(trial) == pytest.approx(8 / 8)
    assert requests_per_s(trial) == pytest.approx(2 / 8)
    assert batch(trial) == pytest.approx(6.5 / 8)


# -------------------------------------------------------------------- engines of known throughput


class LawfulEngine(Server):
    """Batches continuously by a law: (sequences, new prompt tokens) -> seconds."""

    def __init__(self, law: Callable[[int, int], float]) -> None:
        super().__init__()
        self.law, self.new_tokens = law, 0

    def add(self, request_id: str, prompt: Prompt) -> bool:
        self.new_tokens += len(prompt.token_ids)
        return super().add(request_id, prompt)

    def step(self, before_s: float = math.inf) -> dict[str, tuple[int, bool]]:
        self.step_s, self.new_tokens = self.law(len(self.left), self.new_tokens), 0
        return super().step(before_s)


PROMPT_TOKENS = 64


def law(sequences: int, prompt_tokens: int) -> float:
    return 0.02 + 0.003 * sequences + 0.001 * prompt_tokens


def fixed(rng: random.Random) -> int:
    return 24


def exponential(rng: random.Random) -> int:
    return max(1, min(96, round(rng.expovariate(1 / 24))))


Lengths = Callable[[random.Random], int]


def played(traffic: Traffic, lengths: Lengths, seed: int) -> Trial:
    rng = random.Random(seed)
    prompts = (
        Prompt(index=i, token_ids=(0,) * PROMPT_TOKENS, output_tokens=lengths(rng))
        for i in count()
    )  # fmt: skip
    result = play(LawfulEngine(law), traffic, prompts, delays=NONE)
    kind = {"closed": "concurrent", "waves": "waves"}.get(traffic.kind)
    return make_trial(
        records_of(result),
        point=point_under(f"{kind}:{traffic.users}" if kind else "poisson:1"),
        window_s=result.window_s,
        answered_under_load=result.answered_under_load,
    )


@functools.cache
def point_under(load: str) -> Point:
    return make_point(load=load)


def records_of(result: Play) -> list[RequestRecord]:
    return [
        make_record(a.chunks, index=a.index, sent_s=a.sent_s, in_window=a.in_window,
                    scheduled_s=a.scheduled_s)
        for a in result.answers
    ]  # fmt: skip


def by_window(trial: Trial) -> float:
    """Tokens that arrive in the window / its length: over hundreds of cycles that is the rate."""
    start, end = trial.summary.window_s
    return sum(k for r in trial.records for at, k in r.chunks if start <= at < end) / (end - start)


def measured(trial: Trial) -> float:
    rate = output_tokens_per_s(trial)
    assert rate
    return rate


def cycle_s(users: int) -> float:
    return 24 * law(users, 0) + 0.001 * PROMPT_TOKENS * users


@functools.cache
def true_rate(users: int, lengths: Lengths) -> float:
    """Tokens/s over hundreds of cycles, where a cycle more or less is nothing."""
    traffic = Traffic(
        kind="closed", users=users, warmup_s=10 * cycle_s(users), window_s=400 * cycle_s(users)
    )
    return by_window(played(traffic, lengths, seed=0))


def errors(users: int, lengths: Lengths, windows: Sequence[float], drained: bool) -> list[float]:
    """The relative error in windows of so many cycles; `drained` ends the load with the window."""
    truth, found = true_rate(users, lengths), list[float]()
    for seed, cycles in enumerate(windows):
        traffic = Traffic(
            kind="closed",
            users=users,
            warmup_s=1.37 * cycle_s(users),
            window_s=cycles * cycle_s(users),
            least_counted=1 if drained else LEAST_COUNTED,
            most_held_open_s=cycles * cycle_s(users) if drained else 1e6,
        )
        found.append(measured(played(traffic, lengths, seed)) / truth - 1)
    return found


@pytest.mark.parametrize("users", [1, 4, 16])
def test_neither_lockstep_nor_varied_lengths_bias_cycles(users: int) -> None:
    """A window holds a burst more or less, the same one in every repeat."""
    found = errors(users, fixed, [1.2 + 0.3 * i for i in range(12)], drained=False)
    assert max(map(abs, found)) < 0.001
    varied = errors(users, exponential, [6.0] * 60, drained=False)
    assert abs(statistics.mean(varied)) < 0.01


@pytest.mark.parametrize(("users", "cycles"), [(1, 0.5), (1, 1.0), (1, 2.0), (2, 1.0)])
def test_five_requests_of_varied_lengths_have_little_bias(users: int, cycles: float) -> None:
    """A window held open for five requests: the ratio of their sums is 2% low, Beale's 1%."""
    found = errors(users, exponential, [cycles] * 300, drained=False)
    assert abs(statistics.mean(found)) < 0.015


def test_beale_s_correction_by_hand() -> None:
    """Amounts 1 and 3 in 1 s and 2 s: covariance 1, variance 0.5, means 2 and 1.5."""
    expected = (1 + 1 / (2 * 2 * 1.5)) / (1 + 0.5 / (2 * 1.5**2))
    assert beale_correction([1, 3], [1, 2]) == pytest.approx(expected)
    for amounts, times_s in (([2, 2], [3, 3]), ([2], [3]), ([0, 0], [1, 2]), ([], [])):
        assert beale_correction(amounts, times_s) == 1


@pytest.mark.parametrize("users", [4, 16])
def test_cycles_that_end_while_the_batch_empties_are_too_short(users: int) -> None:
    """Where load is not kept on, cycles are left aside, unless users stop together."""
    found = errors(users, exponential, [6.0] * 60, drained=True)
    assert abs(statistics.mean(found)) < 0.02
    lockstep = errors(users, fixed, [1.2 + 0.3 * i for i in range(12)], drained=True)
    assert max(map(abs, lockstep)) < 0.001


def test_whole_waves_have_no_bias() -> None:
    traffic = Traffic(kind="waves", users=8, warmup_s=1, window_s=400 * cycle_s(8))
    truth = by_window(played(traffic, exponential, seed=0))
    rates = [
        measured(played(traffic.model_copy(update={"window_s": 3.0 * cycle_s(8)}), exponential, i))
        for i in range(60)
    ]
    assert statistics.mean(rates) == pytest.approx(truth, rel=0.03)


def test_a_window_has_no_bias_in_an_open_loop() -> None:
    """Requests come at random, so that no burst has its place in the window."""
    rates, rate_per_s, window_s = [], 2.0, 8.0
    for seed in range(120):
        rng, at_s, schedule_s = random.Random(f"{seed}/times"), 0.0, []
        while (at_s := at_s + rng.expovariate(rate_per_s)) < 4 + window_s:
            schedule_s.append(at_s)
        traffic = Traffic(kind="open", schedule_s=tuple(schedule_s), warmup_s=4, window_s=window_s)
        rates.append(measured(played(traffic, fixed, seed)))
    assert statistics.mean(rates) == pytest.approx(24 * rate_per_s, rel=0.03)


# ----------------------------------------------------- the load generator and its virtual clients

_DRIVE = """
import heapq, json, sys
from pathlib import Path
from typing import Literal
from loadtests import load as loads
from loadtests.plan import TrialPlan
from loadtests.records import Chunks, RequestRecord


class Over(loads.gevent.event.Event):
    def wait(self, timeout):  # by the clock of the events, which has passed that time
        return self.is_set()


def drive(given):
    clock = [0.0]
    loads.now = lambda: clock[0]
    load = loads.Load(TrialPlan.model_validate(given["plan"]))
    load._load_over = Over()
    load.start()
    every_s = getattr(load.plan.arrival, "every_s", 0.0)
    streams = load.plan.arrival.users
    starts_s = [every_s if seat == streams else load.rest_s(seat) for seat in range(load.users)]
    events = [(start_s, seat, None) for seat, start_s in enumerate(starts_s)]
    records = []
    while events:
        clock[0], seat, record = heapq.heappop(events)
        if record:
            turn = loads.Turn(load.requests[0], None, record.in_window)
            load.end(loads.Ended(turn, [], 0, clock[0], None, False))
            load.keep([record])
        if seat >= 0 and (turn := load.next_turn(seat)):
            index = turn.request.index
            end_s = clock[0] + given["lasts_s"][index]
            chunks = Chunks([(end_s, 1)])
            record = RequestRecord(index, 1, None, clock[0], chunks, end_s, 1, 1, turn.counts)
            records.append([index, clock[0], turn.counts])
            next_s = max(end_s, load._next_intrusion_s + every_s) if seat == streams else end_s
            next_s += load.rest_s(seat)
            if next_s > end_s:  # the answer is kept before the next turn
                heapq.heappush(events, (end_s, -1, record))
                record = None
            heapq.heappush(events, (next_s, seat, record))
    window_s = (load.window_start_s, load.window_end_s)
    return records, window_s, load.answered_under_load


json.dump({name: drive(given) for name, given in json.load(sys.stdin).items()}, sys.stdout)
"""


Sent = tuple[list[list[float]], list[float], bool]
"""[index, sent, counts] of each request, the window, and whether all that counts was answered."""


class Case(NamedTuple):
    """A load, and what its engine makes of it."""

    users: int
    every_s: float | None
    window_s: float
    speed: float
    requests: int
    answered_under_load: bool
    sessions: Sessions | LogNormal | None = None  # of three turns

    @property
    def turns(self) -> int:
        return 3 if self.sessions else 1

    @property
    def lasts_s(self) -> list[float]:
        rng = random.Random(2)
        return [rng.uniform(0.2, 2.0) / self.speed for _ in range(self.requests)]

    @property
    def traffic(self) -> Traffic:
        return Traffic(
            kind="closed", users=self.users, warmup_s=2, window_s=self.window_s,
            intruder_every_s=self.every_s, least_counted=LEAST_COUNTED,
            least_intruders=LEAST_COUNTED, most_held_open_s=plan.most_held_open_s(self.window_s),
            turns=self.turns, gaps_s=self.sessions.gaps_s if self.sessions else (0,),
            begins_s=tuple(
                self.sessions.begins_s(user) for user in range(self.users) if self.sessions
            ),
        )  # fmt: skip

    def for_the_load_generator(self, home: Path) -> dict[str, Any]:
        requests = [
            Request(i, [], 1, 1, intruder=bool(self.every_s) and intrudes(i))
            for i in range(self.requests)
        ]
        arrival: Arrival = (
            Contended(users=self.users, every_s=self.every_s)
            if self.every_s
            else self.sessions or Concurrent(users=self.users)
        )
        plan.write_requests(home / "requests.jsonl", requests, "none")
        trial = plan.TrialPlan(
            url="", arrival=arrival, requests=home / "requests.jsonl", records=home / "records",
            warmup_s=self.traffic.warmup_s, window_s=self.window_s, timeout_s=1, seed=0,
            lab="none", variant="none", run_id="none", workload="none", turns=self.turns,
        )  # fmt: skip
        return {"plan": trial.model_dump(mode="json"), "lasts_s": self.lasts_s}


CASES = {
    "many cycles": Case(5, None, 6, 1, 200, True),
    "a window held open for an answer a user": Case(8, None, 1, 1, 200, True),
    "for five answers": Case(1, None, 1, 1, 200, True),
    "for five long prompts": Case(2, 0.5, 1, 1, 200, True),
    "long prompts that run out": Case(2, 0.5, 1, 1, 16, True),
    "and no longer than two minutes": Case(2, None, 1, 0.02, 200, False),
    "requests that run out in the window": Case(5, None, 6, 1, 20, False),
    "requests that run out once it is over": Case(5, None, 6, 1, 41, False),
    "sessions": Case(3, None, 12, 1, 200, True, Sessions(users=3, gap_s=1.5)),
    "sessions that run out in a conversation": Case(
        2, None, 12, 1, 10, False, Sessions(users=2, gap_s=0.5)
    ),
    "sessions with drawn gaps": Case(
        3, None, 12, 1, 200, True, LogNormal(users=3, gap_s=1.5, sigma=1)
    ),
}


@pytest.fixture(scope="module")
def sent_by_the_load_generator(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sent]:
    """Each case by the load generator's own rules; in one process of its own.

    Locust patches the process that imports it.
    """
    given = {
        name: case.for_the_load_generator(tmp_path_factory.mktemp("load"))
        for name, case in CASES.items()
    }
    argv, text = [sys.executable, "-c", _DRIVE], json.dumps(given)
    out = subprocess.run(argv, cwd=ROOT, input=text, capture_output=True, text=True, check=True)
    return {name: tuple(of) for name, of in json.loads(out.stdout).items()}


@dataclass
class TimedEngine:
    """Answers each request after a time of its own, whatever else it does.

    It runs 64 steps a second, and one whenever an answer ends or a request comes, so that what is
    sent meanwhile waits for no answer.
    """

    lasts_s: Sequence[float]
    now_s: float = 0.0
    ends_s: dict[str, float] = field(default_factory=dict)

    @property
    def busy(self) -> bool:
        return bool(self.ends_s)

    def add(self, request_id: str, prompt: Prompt) -> bool:
        self.ends_s[request_id] = self.now_s + self.lasts_s[prompt.index]
        return True

    def step(self, before_s: float = math.inf) -> dict[str, tuple[int, bool]]:
        first = min(self.ends_s, key=lambda name: self.ends_s[name])
        tick_s = min(before_s, (math.floor(64 * self.now_s) + 1) / 64)
        if tick_s < self.ends_s[first]:
            self.now_s = tick_s
            return {}
        self.now_s = self.ends_s.pop(first)
        return {first: (1, True)}

    def wait_until(self, at_s: float) -> None:
        self.now_s = max(self.now_s, at_s)


@pytest.mark.parametrize("name", CASES)
def test_virtual_clients_send_what_the_load_generator_does(
    name: str, sent_by_the_load_generator: dict[str, Sent]
) -> None:
    case = CASES[name]
    prompts = [Prompt(index=i, token_ids=(), output_tokens=1) for i in range(case.requests)]
    intruders = [p for p in prompts if case.every_s and intrudes(p.index)]
    plain = [p for p in prompts if p not in intruders]
    engine = TimedEngine(case.lasts_s)
    virtual = play(engine, case.traffic, plain, intruders, delays=NONE)
    sent, window, under_load = sent_by_the_load_generator[name]
    assert [(a.index, a.in_window) for a in virtual.answers] == [(i, c) for i, _, c in sent]
    assert [a.sent_s for a in virtual.answers] == pytest.approx([at for _, at, _ in sent])
    assert virtual.window_s == pytest.approx(window)
    assert virtual.answered_under_load == under_load == case.answered_under_load


@pytest.mark.parametrize("users", [1, 2, 4, 5, 6])
def test_a_brief_window_on_a_slow_machine_counts_five_requests(users: int) -> None:
    """An answer takes ten windows and more: a figure is taken over five all the same."""
    kinds: tuple[Literal["closed", "waves"], ...] = ("closed", "waves")
    for kind in kinds:
        lasts_s = [random.Random(i).uniform(5, 8) for i in range(100)]
        prompts = [Prompt(index=i, token_ids=(), output_tokens=1) for i in range(100)]
        traffic = Traffic(
            kind=kind, users=users, warmup_s=0.3, window_s=0.5, least_counted=LEAST_COUNTED
        )
        played = play(TimedEngine(lasts_s), traffic, prompts, delays=NONE)
        counted = [a for a in played.answers if a.in_window]
        least = max(LEAST_COUNTED, users)
        assert least <= len(counted) <= (least if kind == "closed" else least + users)
        assert played.window_s[1] >= sorted(a.chunks[-1][0] for a in counted)[least - 1]


@pytest.mark.parametrize(
    ("load", "processes", "least"),
    [
        (Concurrent(users=1), 1, [5]),
        (Concurrent(users=1), 4, [5, 5, 5, 5]),  # of which the first alone has a user
        (Concurrent(users=2), 2, [3, 2]),
        (Concurrent(users=4), 3, [2, 2, 1]),
        (Concurrent(users=9), 4, [3, 2, 2, 2]),
        (Concurrent(users=64), 4, [16, 16, 16, 16]),
        (Contended(users=4, every_s=1), 1, [5]),
        (Contended(users=16, every_s=1), 2, [8, 8]),
        (Waves(size=4), 2, [5, 5]),  # which the first sends alone
    ],
)
def test_the_load_processes_count_five_requests_together(
    load: Arrival, processes: int, least: list[int]
) -> None:
    shares = [
        plan.TrialPlan(
            url="", arrival=load, requests=Path("x"), records=Path("x"), warmup_s=1, window_s=1,
            timeout_s=1, seed=0, lab="none", variant="none", run_id="none", workload="none",
            share=(number, processes),
        )
        for number in range(processes)
    ]  # fmt: skip
    assert [share.least_counted for share in shares] == least
    together = sum(share.least_counted for share in shares if share.seats)
    assert together == max(LEAST_COUNTED, load.users)  # as one process alone
