"""What is wrong with a trial, each fault alone and at its limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from labs.harness.analysis import expected_treatment
from labs.harness.analysis.checks.expected import TRANSPORT_S, Expected, Served, usual_transport_s
from labs.harness.analysis.checks.run import CachedRepeats
from labs.harness.analysis.checks.transport import is_one_stream, transport_s
from labs.harness.analysis.computed import Band, PointForecasts, Predictions
from labs.harness.analysis.measure import OtherWork, Trial, ran_out
from labs.harness.analysis.validity import (
    CHECKS,
    MODULES,
    SERVER_BUSY,
    caveats_of,
    check,
    disturbances_of,
)
from labs.harness.analysis.verdicts import Caveat
from labs.harness.derived.design import transports_s
from labs.harness.derived.summarize import computed
from labs.harness.spec.declare import echoes
from labs.harness.spec.lab import Arm, Evidence, Point
from labs.harness.storage.writing import write_json
from loadtests.records import Chunks, RequestRecord
from loadtests.workload import Asked, Chat, Fixed, Intruder, Prefix
from serving import metrics
from serving.hardware.machine import Environment
from serving.hardware.telemetry import Sample
from serving.metrics import Histogram, Snapshot
from tests.cases import each
from tests.unit.builders import (
    make_claim,
    make_engine,
    make_point,
    make_record,
    make_trial,
    make_workload,
    write_run,
)
from tests.unit.test_judge import FASTER, judged, rates

INF = float("inf")
HITS, CACHE = metrics.PREFIX_HITS, metrics.CACHE_CONFIG
EVIDENCE = (
    Evidence(arm=Arm(variant="off"), kind="stays", metric=metrics.PREEMPTIONS),
    Evidence(arm=Arm(variant="off"), kind="echoes", metric=CACHE, label="caching", value="False"),
    Evidence(arm=Arm(variant="off"), kind="rises", metric=metrics.PROMPT_TOKENS),
    Evidence(arm=Arm(variant="on"), kind="rises", metric=HITS),  # of another variant
)
VALUES = {
    metrics.REQUESTS: 50.0,
    metrics.GENERATION_TOKENS: 100.0,
    metrics.PREEMPTIONS: 0.0,
    metrics.PROMPT_TOKENS: 200.0,
    HITS: 0.0,
}
SEEN = Histogram((0.05, 0.1, 0.2, 0.4, INF), (0, 0, 50, 50, 50), 50 * 0.149, 50)
CLEAN = [
    make_record([(t + 0.15, 1), (t + 0.2, 1)], sent_s=t, scheduled_s=t - 0.001, index=i)
    for i, t in enumerate(np.linspace(10, 19, 50))
]
ASKED = [Asked(4, 2)] * 50


def checked(
    records: list[RequestRecord] | None = None,
    values: Mapping[str, float] = VALUES,
    seen: Histogram | None = SEEN,
    caching: str = "False",
    engine: bool = True,
    asked: Sequence[Asked] = ASKED,
    expected: Expected | None = None,
    other_work: OtherWork | None = None,
    **summary: Any,
) -> list[Caveat]:
    histograms = {metrics.TTFT: seen} if seen else {}
    info = {CACHE: {"caching": caching, "block_size": "2", "num_gpu_blocks": "1000"}}
    trial: Trial = make_trial(
        CLEAN if records is None else records,
        engine=Snapshot(dict(values), histograms, info) if engine else None,
        **summary,
    )
    trial = replace(trial, asked=asked, other_work=other_work or OtherWork(0.0, 0.01, 0.5, 0))
    return caveats_of(trial, expected or Expected(evidence=EVIDENCE, template_tokens=1))


def some(n: int, **fields: Any) -> list[RequestRecord]:
    """The clean trial with its first n records changed."""
    return [replace(r, **fields) for r in CLEAN[:n]] + CLEAN[n:]


TRIPLED = {**VALUES, metrics.GENERATION_TOKENS: 150.0}
BUNDLED = [
    replace(r, chunks=Chunks([r.chunks[0], (r.chunks[1][0], 2)]), output_tokens=3, asked_tokens=3)
    for r in CLEAN
]
A_FEW = BUNDLED[:5] + CLEAN[5:]
A_FEW_MORE = {**VALUES, metrics.GENERATION_TOKENS: 105.0}
HALF = [replace(r, asked_tokens=4) for r in CLEAN]  # answers half as long as asked
LATE = [
    replace(r, chunks=Chunks((at + 0.2, k) for at, k in r.chunks)) for r in CLEAN
]  # the client is 200 ms late


def without(name: str) -> dict[str, float]:
    return {n: v for n, v in VALUES.items() if n != name}


def counting(count: int, mean_s: float = 0.149) -> Histogram:
    return Histogram(SEEN.le, (0, 0, count, count, count), count * mean_s, count)


ONE_IN_A_HUNDRED = [*some(1, error="reset"), *CLEAN]
OF_99 = {n: v + v - v / 50 for n, v in VALUES.items()}
ENDPOINT, SILENT = Expected(endpoint=True), Expected(endpoint=True, metrics_read=False)
PROMPTS: dict[str, Any] = {
    "records": some(50, prompt_tokens=100),
    "values": {**VALUES, metrics.PROMPT_TOKENS: 5000.0},
    "expected": ENDPOINT,
}


def test_a_prompt_that_failed_before_its_first_token_may_have_been_found_in_the_cache() -> None:
    """The engine counts what it looked up, and nobody counts the prompt's tokens."""
    point = make_point(flags={"enable-prefix-caching": True}, prefix=Prefix(tokens=4), primed=True)
    info = {CACHE: {"block_size": "2", "num_gpu_blocks": "1000"}}
    done = [make_record([(11.0, 1)], index=i, prompt_tokens=6) for i in range(3)]
    lost = [*done[:2], replace(done[2], chunks=Chunks([]), prompt_tokens=None, error="timed out")]
    bounds = [
        expected_treatment.cached_tokens(
            replace(
                make_trial(found, point=point, engine=Snapshot({}, {}, info)),
                asked=[Asked(6, 4)] * 3,
            ),
            0,
        )
        for found in (done, lost)
    ]
    assert all(bounds)
    assert len({b.high for b in bounds if b}) == 1


@each(("last_s", "more"), [(38.0, False), (100.0, True)])
def test_a_trace_that_is_over_has_not_run_out(last_s: float, more: bool) -> None:
    """At twice its speed it ends in second 19, or goes on beyond what was prepared of it."""
    trace = ((0.0, 6, 4), (last_s, 6, 4))
    point = make_point(load="replay:2", trace=trace)
    found = [make_record([(11.0, 1)], index=i, prompt_tokens=6) for i in range(6)]
    trial = make_trial(found, point=point, exhausted=True, window_s=(10.0, 19.0))
    assert ran_out(point, trial.summary) == more


def test_every_function_that_finds_something_has_its_row() -> None:
    functions = {
        function
        for module in MODULES.values()
        for name, function in vars(module).items()
        if not name.startswith("_")
        and getattr(function, "__module__", "") == module.__name__
        and getattr(function, "__annotations__", {}).get("return") == "Found"
    }
    assert functions == {row.found for rows in CHECKS.values() for row in rows}


def test_clean_trial_has_no_caveat() -> None:
    assert checked() == []


@each(
    ("name", "blocks", "changes"),
    [
        ("errors", True, {"records": some(1, error="reset")}),
        ("nothing measured", True, {"records": some(50, in_window=False)}),
        ("too few requests", True, {"records": some(46, in_window=False)}),
        ("load process lost", True, {"lost_share": 0.5}),
        ("ran out of requests", False, {"exhausted": True}),
        ("ran out of requests", False, {"exhausted": True, "planned": 100, "sent": 50}),
        ("generator lagged", True, {"records": some(3, scheduled_s=9.0)}),
        ("generator's loop lagged", True, {"loop_lag_p99_s": 0.021}),
        ("generator's loop lagged", True, {"loop_lag_max_s": 1.0}),  # frozen for a second
        ("generator's loop lagged", True, {"loop_lag_max_s": 0.101}),  # twice the gap of 50 ms
        ("fell behind the schedule", True, {"planned": 100, "sent": 94}),
        ("token counts differ", True, {"records": some(1, chunks=Chunks([(10.15, 1)]))}),
        ("lengths differ", True, {"records": some(1, asked_tokens=3)}),
        ("lengths differ", True, {"records": HALF}),
        ("prompts differ", True, {"asked": [Asked(16, 2)] * 50}),
        ("several tokens a chunk", True, {"records": BUNDLED, "values": TRIPLED}),
        ("several tokens a chunk", False, {"records": A_FEW, "values": A_FEW_MORE}),
        ("client and engine disagree", True, {"values": {**VALUES, metrics.REQUESTS: 51}}),
        ("client and engine disagree", True, {"values": {**VALUES, metrics.PROMPT_TOKENS: 400}}),
        ("client and engine disagree", True, {"values": {**VALUES, metrics.GENERATION_TOKENS: 99}}),
        ("TTFT differs", True, {"records": LATE}),
        ("TTFT differs", True, {"seen": counting(50, 0.1)}),
        ("TTFT differs", True, {"seen": counting(50, 0.2)}),
        ("load from others", True, {"other_work": OtherWork(0.021, 0.0, 0.5)}),
        ("other processes", True, {"other_work": OtherWork(0.0, 0.026, 0.5)}),
        ("other processes", True, {"other_work": OtherWork(0.0, 0.05)}),  # an old record
        ("GPU shared", True, {"other_work": OtherWork(gpu_processes=1)}),
        ("engine's metrics unreadable", True, {"engine": False}),
        ("engine's metrics incomplete", True, {"seen": None}),
        ("treatment not applied", True, {"values": {**VALUES, metrics.PREEMPTIONS: 1}}),
        ("treatment not applied", True, {"caching": "True"}),
        ("treatment not applied", True, {"values": without(metrics.PREEMPTIONS)}),
        ("errors", False, {"records": ONE_IN_A_HUNDRED, "values": OF_99, "seen": counting(99)}),
        ("engine's metrics incomplete", True, {"records": LATE, "seen": counting(49)}),
        ("engine's metrics incomplete", True, {"records": LATE, "seen": counting(0)}),
        ("engine shows no metrics", False, {"engine": False, "expected": SILENT}),
        ("engine's metrics unreadable", True, {"engine": False, "expected": ENDPOINT}),
        ("prompts differ", True, {**PROMPTS, "asked": [Asked(110, 2)] * 50}),
        ("other processes", True, {"other_work": OtherWork(0.0, 0.0009, 1 / 64, cores=64)}),
    ],
)
def test_caveat(name: str, blocks: bool, changes: dict[str, Any]) -> None:
    (caveat,) = checked(**changes)
    assert (caveat.name, caveat.blocks, caveat.point) == (name, blocks, "off/short/concurrent-1")
    assert caveat.text


@each("changes", [{"loop_lag_p99_s": 0.021}, {"records": LATE}])
def test_late_clients_leave_what_the_engine_counts(changes: dict[str, Any]) -> None:
    (caveat,) = checked(**changes)
    assert caveat.point
    assert caveat.hits("ttft_mean_s", caveat.point)
    assert not caveat.hits("prefix_hit_rate", caveat.point)


@each(
    "changes",
    [
        {"records": some(2, scheduled_s=9.0)},  # 4% late
        {"records": [replace(r, scheduled_s=r.sent_s - 0.0049) for r in CLEAN]},  # up to 5 ms
        {"loop_lag_p99_s": 0.019},
        {"loop_lag_max_s": 0.099},  # the gaps are of 50 ms
        {"planned": 100, "sent": 95},
        {"other_work": OtherWork(0.019, 0.024, 0.5)},
        {"other_work": OtherWork(0.0, 0.047)},
        {"asked": ()},  # it was not recorded what was asked
        {"records": some(45, in_window=False)},  # five are left
        {"seen": counting(50, 0.1312)},  # 10 ms, and 8.8 beyond
        {**PROMPTS, "asked": [Asked(104, 2)] * 50},  # an endpoint may count a little otherwise
        {"other_work": OtherWork(0.0, 0.0003, 1 / 64, cores=64)},
        {"other_work": OtherWork(0.0, 0.004, 0.01, cores=2)},  # a tick or two
    ],
)
def test_just_good_enough_is_no_caveat(changes: dict[str, Any]) -> None:
    assert checked(**changes) == []


@each("metric", [metrics.REQUESTS, metrics.PROMPT_TOKENS, metrics.GENERATION_TOKENS, HITS])
def test_a_counter_that_was_renamed_blocks_by_its_name(metric: str) -> None:
    caveats = {c.name: c for c in checked(values=without(metric))}
    missing = caveats["engine's metrics incomplete"]
    assert missing.blocks
    assert metric in missing.text


@each(
    ("count", "mean_s", "names"),
    [
        (400, 0.149, []),
        (401, 0.149, []),  # the failed one, too, as fast as the others
        (401, 0.1495, []),  # and slower: it waited for a second
        (401, 0.3, ["TTFT differs"]),  # no wait of one request explains that
        (400, 0.100, ["TTFT differs"]),
        (402, 0.149, ["engine's metrics incomplete"]),
        (399, 0.149, ["engine's metrics incomplete"]),
    ],
)
def test_a_failed_request_bounds_the_engines_mean_and_skips_no_check(
    count: int, mean_s: float, names: list[str]
) -> None:
    found = [replace(CLEAN[i % 50], index=i) for i in range(400)]
    lost = make_record([], index=400, sent_s=12.0, end_s=13.0)
    engine = replace(make_engine(found), histograms={metrics.TTFT: counting(count, mean_s)})
    caveats = caveats_of(make_trial([*found, lost], engine=engine), Expected(template_tokens=1))
    assert [c.name for c in caveats if c.blocks] == names


def test_what_transport_takes_is_measured_at_one_stream_and_the_constant_is_its_cap() -> None:
    """A client 18 ms late passed, as 10 ms were granted to a transport that takes 1 ms."""
    fast = make_trial(CLEAN, engine=make_engine(CLEAN))  # the client is 1 ms later
    late = make_trial(LATE, engine=make_engine(CLEAN))
    lost = make_trial([*CLEAN, make_record([])], engine=make_engine(CLEAN))
    fast_s, late_s = transport_s(fast), transport_s(late)
    assert fast_s
    assert late_s
    assert fast_s == pytest.approx(0.001, abs=5e-5)
    assert usual_transport_s([fast_s, fast_s, late_s]) == fast_s
    assert usual_transport_s([late_s]) == TRANSPORT_S
    assert transport_s(lost) is None
    assert is_one_stream(make_point())
    assert not is_one_stream(make_point(load="concurrent:2"))
    seen = counting(50, 0.1312)  # 10 ms, and 8.8 beyond
    measured = Expected(evidence=EVIDENCE, template_tokens=1, transport_s={"off": 0.001})
    assert [c.name for c in checked(seen=seen, expected=measured)] == ["TTFT differs"]
    assert checked(seen=seen) == []  # nothing was measured at one stream
    together = [replace(r, sent_s=10.0, chunks=CLEAN[0].chunks) for r in CLEAN]
    names = {c.name for c in checked(together, seen=seen, expected=measured)}
    assert "TTFT differs" not in names  # 50 that are taken in one after another


def test_transport_is_taken_from_the_variants_own_trials(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    run = folder.run()
    points, lab = run.points(), run.rebuilt_lab()
    expected = run.expected(folder.predictions())

    def usual_s() -> Mapping[str, float]:
        return expected.with_transport(transports_s(folder, points, lab, expected)).transport_s

    assert usual_s() == pytest.approx({"off": 0.001, "on": 0.001}, abs=5e-5)
    (one,) = (p for p in points if p.variant.name == "on" and is_one_stream(p))
    for repeat in (1, 2):  # a client that was late tells nothing of the transport
        result = folder.trial_result(one, repeat)
        assert result
        assert result.summary
        late = result.summary.model_copy(update={"loop_lag_max_s": 2.5})
        path = folder.trial_folder(one, repeat) / "trial.json"
        write_json(path, result.model_copy(update={"summary": late}))
    assert usual_s() == pytest.approx({"off": 0.001}, abs=5e-5)


@each("part", [True, False])
def test_a_gpu_that_refuses_to_be_read_blocks_unless_it_is_a_part_of_one(part: bool) -> None:
    expected = Expected(template_tokens=1, on_gpus=True, gpu_part=part)
    for processes, throttle, unread in ((0, "", 0), (None, "", 1), (0, None, 1), (None, None, 2)):
        shown: dict[str, Any] = {
            "telemetry": [Sample(time_s=15.0, device="0", throttle=throttle)],
            "other_work": OtherWork(0.0, 0.01, 0.5, processes),
        }
        found = checked(**shown, expected=expected)
        assert [c.name for c in found] == ["hardware could not be read"] * bool(unread)
        assert all(c.blocks is not part for c in found)
        assert sum(c.text.count("whether") for c in found) == unread
        assert not checked(**shown)  # on a CPU, or of an earlier run


@each(
    ("kind", "asked", "on_gpus"),
    [("gpu", {"compute_mode": None}, True), ("gpu", {}, False), ("cpu", {}, False)],
)
def test_a_run_on_file_reads_as_it_did(
    kind: Literal["cpu", "gpu"], asked: Any, on_gpus: bool, tmp_path: Path
) -> None:
    """By what it recorded, whenever it was."""
    run = write_run(tmp_path).run()
    machine = run.machine.model_copy(update={"kind": kind})
    environment = Environment(python="3", packages={}, kernel="6", **asked)
    run = run.model_copy(update={"machine": machine, "environment": environment})
    expected = run.expected(Predictions(effects={}, forecasts={}))
    assert expected.on_gpus is on_gpus
    assert expected.gpu_part  # it did not record whether it was: no verdict is withheld


def test_an_endpoint_leaves_its_machine_unseen(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    run = folder.run().model_copy(update={"endpoint": "http://127.0.0.1:1", "argv": {}})
    write_json(folder.path / "run.json", run)
    names = {c.name: c.blocks for c in computed(folder).caveats}
    assert names["endpoint's hardware unknown"] is False


def test_too_few_requests_or_long_prompts_block_what_is_taken_over_them_alone() -> None:
    (requests,) = checked(some(46, in_window=False))
    point = make_point(load="contended:1/2", intruder=Intruder(prompt_tokens=100))
    visit = make_record([(12.0, 1)], sent_s=11.0, index=3)
    found = caveats_of(make_trial([*CLEAN[:3], visit], point=point), Expected())
    (prompts,) = (c for c in found if c.name == "too few long prompts")
    for caveat, blocked, free in (
        (requests, ("tpot_mean_s", "output_tokens_per_s"), ("prefix_hit_rate", "itl_p50_s")),
        (prompts, ("stall_mean_s",), ("tpot_mean_s",)),
    ):
        at = caveat.point or ""
        assert all(caveat.hits(metric, at) for metric in blocked)
        assert not any(caveat.hits(metric, at) for metric in free)


def slowing(factor: float) -> list[RequestRecord]:
    """One user whose steps of 20 ms grow by this factor along the window, with noise of 5%."""
    rng, at, found = np.random.default_rng(1), 10.0, list[RequestRecord]()
    while at < 20:
        sent_s, chunks = at, []
        for _ in range(20):
            at += 0.02 * factor ** ((at - 10) / 10) * float(rng.lognormal(0, 0.05))
            chunks.append((at, 1))
        found.append(make_record(chunks, sent_s=sent_s, index=len(found)))
    return found


@each(
    ("factor", "names"),
    [(1.0, []), (1.1, []), (1.4, ["trend in the window"]), (0.7, ["trend in the window"])],
)
def test_an_engine_that_slows_along_the_window_is_noticed(factor: float, names: list[str]) -> None:
    found = slowing(factor)
    caveats = caveats_of(make_trial(found, engine=make_engine(found, True)), Expected())
    assert [c.name for c in caveats] == names


@each(("factor", "names"), [(1.0, []), (1.1, []), (1.5, ["trend in the window"])])
def test_it_is_noticed_where_requests_take_turns_too(factor: float, names: list[str]) -> None:
    """Four of five requests went to other engines, so that tenths of the window have no step."""
    found = [replace(r, index=i) for i, r in enumerate(slowing(factor)[::5])]
    trial = make_trial(found, engine=make_engine(found, True))
    apart = {c.name for c in caveats_of(trial, Expected())}
    together = replace(trial, beside=("on/short/concurrent-1",))
    assert [c.name for c in caveats_of(together, Expected())] == names
    assert "trend not checked" in apart


def speed_at(at: float, factor: float) -> float:
    """By how much longer a step takes after so much of the window from 10 to 20 s."""
    return math.exp(math.log(factor) * (at - 10) / 10)


def waves(factor: float, size: int = 8, seed: int = 1) -> Trial:
    """Waves of answers of random lengths, whose steps grow with the batch and by the factor."""
    rng, at, found = np.random.default_rng(seed), 9.0, list[RequestRecord]()
    while at < 20:
        sent_s, left = at, {i: int(rng.integers(10, 60)) for i in range(size)}
        chunks: dict[int, list[tuple[float, int]]] = {i: [] for i in left}
        at += 0.05
        while left:
            at += (0.02 + 0.001 * len(left)) * speed_at(at, factor) * float(rng.lognormal(0, 0.05))
            for i in list(left):
                chunks[i].append((at, 1))
                left[i] -= 1
                if not left[i]:
                    del left[i]
        found += [
            make_record(c, sent_s=sent_s, index=len(found) + i, in_window=10 <= sent_s < 20)
            for i, c in chunks.items()
        ]
    return make_trial(found, engine=make_engine(found), point=make_point(load=f"waves:{size}"))


def open_loop(factor: float, rate_per_s: float = 3.0, grows: float = 1.0, seed: int = 1) -> Trial:
    """Poisson arrivals whose rate may grow; steps grow with the batch and by the factor."""
    rng, at, found = np.random.default_rng(seed), 8.0, list[RequestRecord]()
    due = [8.0]
    while due[-1] < 20:
        rate = rate_per_s * grows ** ((due[-1] - 8) / 12)
        due.append(due[-1] + float(rng.exponential(1 / rate)))
    running: dict[int, tuple[float, list[tuple[float, int]]]] = {}
    waiting = list(enumerate(due))
    while waiting or running:
        while waiting and waiting[0][1] <= at:
            index, due_s = waiting.pop(0)
            running[index] = (due_s, [])
        if not running:
            at = waiting[0][1]
            continue
        at += (0.02 + 0.003 * len(running)) * speed_at(at, factor) * float(rng.lognormal(0, 0.05))
        for index, (due_s, chunks) in list(running.items()):
            chunks.append((at, 1))
            if len(chunks) == 40:
                del running[index]
                found.append(
                    make_record(chunks, sent_s=due_s, scheduled_s=due_s, index=index,
                                in_window=10 <= due_s < 20)
                )  # fmt: skip
    return make_trial(found, engine=make_engine(found), point=make_point(load="poisson:3"))


def named(trial: Trial) -> list[str]:
    return [c.name for c in caveats_of(trial, Expected(template_tokens=1))]


@each("play", [waves, open_loop])
@each(
    ("factor", "names"),
    [(1.0, []), (1.4, ["trend in the window"]), (1 / 1.4, ["trend in the window"])],
)
def test_an_engine_that_slows_is_noticed_in_waves_and_in_an_open_loop(
    play: Callable[[float], Trial], factor: float, names: list[str]
) -> None:
    assert named(play(factor)) == names


@each("play", [waves, open_loop, partial(open_loop, grows=4.0)])
def test_neither_noise_nor_a_load_that_grows_is_a_trend_of_the_engine(
    play: Callable[..., Trial],
) -> None:
    """Where it grows, steps take twice as long at the end, of three times as many requests."""
    trials = [play(1.0, seed=seed) for seed in range(20)]
    assert not any("trend in the window" in named(trial) for trial in trials)


@each("load", ["concurrent:1", "waves:1", "poisson:3"])
def test_where_too_little_is_there_for_a_trend_a_caveat_says_so(load: str) -> None:
    """Such as answers of one token, between whose chunks nothing passes."""
    found = [make_record([(t + 0.15, 1)], sent_s=t) for t in np.linspace(10, 19, 50)]
    trial = make_trial(found, engine=make_engine(found), point=make_point(load=load))
    (caveat,) = caveats_of(trial, Expected(template_tokens=1))
    assert (caveat.name, caveat.blocks) == ("trend not checked", False)


def test_noise_that_is_correlated_over_seconds_is_no_trend() -> None:
    """At a step's noise of 5% none of fifty windows is."""
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(50):
        speed, at, found = 0.0, 10.0, list[RequestRecord]()
        while at < 20:
            sent_s, chunks = at, []
            for _ in range(20):
                speed = 0.99 * speed + 0.05 * math.sqrt(1 - 0.99**2) * float(rng.normal())
                at += 0.02 * math.exp(speed)
                chunks.append((at, 1))
            found.append(make_record(chunks, sent_s=sent_s, index=len(found)))
        trial = make_trial(found, engine=make_engine(found, True))
        alarms += "trend in the window" in {c.name for c in caveats_of(trial, Expected())}
    assert alarms == 0


# ------------------------------------------------------------------------- the treatment's dose


def prefixed_trial(
    hits: float,
    n: int = 20,
    blocks: int = 1000,
    users: int = 1,
    load: str = "concurrent:{}",
    prompt: int = 64,
    lost: int = 0,
    preemptions: float = 0.0,
    guesses: bool = False,
    **fields: Any,
) -> Trial:
    """A trial whose prompts of 64 tokens find so many in blocks of 16.

    `lost` of the requests failed.
    """
    flags: dict[str, Any] = {"enable-prefix-caching": True}
    guessing = {"method": "ngram", "num_speculative_tokens": 2}
    point = make_point(
        "on",
        load.format(users),
        flags=flags | ({"speculative-config": guessing} if guesses else {}),
        prompt_tokens=Fixed(tokens=prompt),
        **fields,
    )
    found = [replace(CLEAN[i % len(CLEAN)], index=i, prompt_tokens=prompt) for i in range(n)]
    for i in range(n - lost, n):
        found[i] = replace(found[i], error="reset", prompt_tokens=None)
    engine = make_engine(found, True, hits)
    config = {"block_size": "16", "num_gpu_blocks": str(blocks), "enable_prefix_caching": "True"}
    counted = {metrics.PREEMPTIONS: preemptions}
    counted |= dict.fromkeys(
        (metrics.SPEC_DRAFTS, metrics.SPEC_DRAFTED, metrics.SPEC_ACCEPTED), 0.0
    )
    engine = replace(engine, values={**engine.values, **counted}, info={CACHE: config})
    return make_trial(found, engine=engine, point=point)


def prefixed(hits: float, **fields: Any) -> list[str]:
    """The names of what is wrong with such a trial by itself."""
    trial, expected = prefixed_trial(hits, **fields), Expected(template_tokens=10)
    return [c.name for c in caveats_of(trial, expected) if c.blocks]


def over_repeats(
    hits: Sequence[float],
    least: float,
    own: int = 3,
    after_each: Sequence[int] = (),
    **fields: Any,
) -> list[str]:
    """The names of what is wrong with such repeats together.

    `least` is the forecast's low end, `after_each` what it finds at least after each request.
    """
    trials = [prefixed_trial(of_repeat, **fields) for of_repeat in hits]
    found = [repeat for t in trials if (repeat := expected_treatment.cache_hits(t, 10))]
    assert len(found) == len(trials)
    point = trials[0].point
    least_found = {point.key: after_each} if after_each else {}
    expected = Expected(least_hit_rate={point.key: least}, least_found=least_found)
    repeats = CachedRepeats(point, found, own)
    return [c.name for c in check("cached-repeats", point.key, repeats, expected)]


SHARED = Prefix(tokens=40)  # and the template's 10: three whole blocks of 16
EXACT = 19 * 48 + 48  # the first one was sent before: 63 of its tokens, in whole blocks


PRIMED: dict[str, Any] = {"prefix": SHARED, "primed": True}
IN_TURN: dict[str, Any] = {"prefix": Prefix(tokens=40, groups=8)}
IN_ORDER: dict[str, Any] = {"prefix": Prefix(tokens=40, groups=8, order=(0, 0, 3, 1, 3, 7))}
CHATTING: dict[str, Any] = {"chat": Chat(turns=2, grows_tokens=30)}  # two blocks in every other
SALTED: dict[str, Any] = {"chat": Chat(turns=2, grows_tokens=30, salted="request")}


@each(
    ("hits", "fields", "names"),
    [
        (EXACT, PRIMED, []),
        (19 * 32 + 48, PRIMED, []),  # the template may be shorter than it is at most
        (0.06 * 64 * 20, PRIMED, ["treatment not applied"]),  # 6% where 75% are to be
        (EXACT + 16, PRIMED, ["warm prefix cache"]),  # of a trial before: it was not reset
        # one error in a hundred leaves the dose of all other requests known
        (0.06 * 64 * 100, {**PRIMED, "n": 100, "lost": 1}, ["treatment not applied"]),
        (98 * 48, {**PRIMED, "n": 100, "lost": 1}, []),
        # of more prefixes than the cache holds none is found
        (0, {**IN_TURN, "primed": True, "blocks": 20}, []),
        (0.6 * 64 * 20, {**IN_TURN, "primed": True, "blocks": 20}, ["warm prefix cache"]),
        # unless they come in another order, which finds one that has just been sent
        (10 * 48, {**IN_ORDER, "blocks": 20}, []),
        (20 * 64, {**IN_ORDER, "blocks": 20}, ["warm prefix cache"]),
        # where they may or may not stay, only the most is known
        (0, {**IN_TURN, "primed": True, "blocks": 40}, []),
        (500, {**IN_TURN, "primed": True, "blocks": 40}, []),
        # where nothing is shared, nothing but the template is found
        (0, {"prompt": 32}, []),
        (31 * 20, {"prompt": 32}, ["warm prefix cache"]),
        # a turn of a chat finds the turn before it, which may be under way beside another user's
        (10 * 32, CHATTING, []),
        (9 * 32, CHATTING, ["treatment not applied"]),
        (9 * 32, {**CHATTING, "users": 2}, []),
        # unless each has a session of its own, and all of them fit
        (10 * 32, {**CHATTING, "users": 2, "load": "sessions:{}/1"}, []),
        (9 * 32, {**CHATTING, "users": 2, "load": "sessions:{}/1"}, ["treatment not applied"]),
        (9 * 32, {**CHATTING, "users": 2, "load": "sessions:{}/1", "blocks": 20}, []),
        # and it finds nothing under a salt of its own
        (0, SALTED, []),
        (10 * 32, SALTED, ["warm prefix cache"]),
    ],
)
def test_what_is_found_in_the_cache_lies_between_what_must_and_what_can_be(
    hits: float, fields: dict[str, Any], names: list[str]
) -> None:
    assert prefixed(hits, **fields) == names


@each(
    ("hits", "names"),
    [
        ((0, 0, 0), ["treatment not applied"]),
        ((200, 210, 220), ["treatment not applied"]),  # of 1,280 tokens each: 653 together
        ((180, 200, 280), []),  # two below what is to be on average
    ],
)
def test_where_the_dose_hangs_on_chance_the_forecasts_band_bounds_all_repeats_together(
    hits: Sequence[float], names: list[str]
) -> None:
    """Shuffled documents, or a chat of two users; 85% of the low end of the band is enough."""
    shuffled = Prefix(tokens=40, groups=4, shuffled=True)
    chat = Chat(turns=2, grows_tokens=30)
    assert over_repeats(hits, 0.2, prefix=shuffled) == names
    assert over_repeats(hits, 0.2, chat=chat, users=2) == names
    for of_repeat in hits:  # by itself each may be chance
        assert prefixed(of_repeat, prefix=shuffled) == []


def test_few_requests_must_find_what_so_many_find_in_the_forecast() -> None:
    """A slow machine sent fewer than were forecast, whose first ones find nothing."""
    shuffled = Prefix(tokens=40, groups=4, shuffled=True)
    after_each = (0, 0, 0, 0, *(48 * n for n in range(1, 17)))  # of 20 requests
    of_band = 0.6  # 768 of 1,280 tokens
    fields: dict[str, Any] = {"prefix": shuffled, "after_each": after_each}
    assert over_repeats([650], of_band, 1, **fields) == ["treatment not applied"]
    assert over_repeats([660], of_band, 1, **fields) == []
    assert over_repeats([80], of_band, 1, n=6, **fields) == ["treatment not applied"]
    assert over_repeats([90], of_band, 1, n=6, **fields) == []
    assert over_repeats([0], of_band, 1, n=4, **fields) == []
    assert over_repeats([90], of_band, 1, n=6, prefix=shuffled) == ["treatment not applied"]
    # of more requests than were forecast: as many again find as much again
    assert over_repeats([1300], of_band, 1, n=40, **fields) == ["treatment not applied"]
    assert over_repeats([1320], of_band, 1, n=40, **fields) == []


def test_a_mean_of_fewer_repeats_than_were_forecast_proves_no_dose() -> None:
    shuffled = Prefix(tokens=40, groups=4, shuffled=True)
    assert over_repeats((300, 300), 0.2, prefix=shuffled) == ["treatment not proved"]
    assert over_repeats((EXACT,), 0.2, **PRIMED) == []  # it is no chance


@each(("low", "applied"), [(0.3, True), (0.5, False)])
def test_a_report_holds_the_repeats_of_a_point_together_against_its_forecast(
    low: float, applied: bool, tmp_path: Path
) -> None:
    """Each of two repeats found 8 tokens of 30."""
    shuffled = make_workload("concurrent:1", prefix=Prefix(tokens=4, groups=2, shuffled=True))
    folder = write_run(tmp_path, workloads=(shuffled,))
    key = next(p.key for p in folder.run().points() if p.variant.name == "on")
    band = {"prefix_hit_rate": Band(value=0.6, low=low, high=0.7)}
    forecast = PointForecasts(points={key: band})
    predictions = folder.predictions().model_copy(update={"in_virtual_time": forecast})
    write_json(folder.path / "predictions.json", predictions)
    found = [c.text for c in computed(folder).caveats if c.name == "treatment not applied"]
    assert found == [] if applied else "16 prompt tokens were found" in found[0]


@each("why", ["preempted", "guessing"])
def test_a_preemption_or_speculation_leaves_the_forecast_as_the_least(why: str) -> None:
    more: dict[str, Any] = {"preemptions": 1.0} if why == "preempted" else {"guesses": True}
    for hits, names in ((0.06 * 64 * 20, ["treatment not applied"]), (0.7 * 64 * 20, [])):
        assert over_repeats([hits], 0.75, 1, **PRIMED, **more) == names


def test_a_cache_of_unknown_blocks_proves_nothing() -> None:
    trial = prefixed_trial(EXACT, **PRIMED)
    assert trial.engine
    trial = replace(trial, engine=replace(trial.engine, info={}))
    names = {c.name for c in caveats_of(trial, Expected(template_tokens=10)) if c.blocks}
    assert "engine's metrics incomplete" in names


# ---------------------------------------------------------------------------- what is shown of it


def faults(trial: Trial, expected: Expected) -> set[str]:
    """The functions of the table that find that a treatment was another than it was to be."""
    rows = CHECKS["requests"] + CHECKS["treatment"]
    treated = [row for row in rows if row.name == "treatment not applied"]
    return {row.found.__name__ for row in treated if [*row.caveats(None, trial, expected)]}


def showing(records: list[RequestRecord], flags: Any = None, **info: dict[str, str]) -> Trial:
    """A trial whose engine shows these info metrics, by their names in `serving.metrics`."""
    shown = {getattr(metrics, name): labels for name, labels in info.items()}
    engine = replace(make_engine(records, True), info={CACHE: {"block_size": "2"}, **shown})
    return make_trial(records, engine=engine, point=make_point(flags=flags or {}))


@each(
    ("counts", "method", "least_copied", "names"),
    [
        ((205, 410, 197), "draft_model", None, set()),
        ((240, 480, 160), "draft_model", None, {"accepted_otherwise"}),  # 33.3%, of at least 34.0%
        ((400, 800, 1), "draft_model", None, {"accepted_otherwise"}),
        ((205, 205, 190), "draft_model", None, {"drafted_otherwise"}),  # one guess each, not two
        ((20, 40, 20), "draft_model", None, {"drafts_do_not_add_up"}),  # in a few steps only
        ((None, 40, 20), "draft_model", None, {"drafts_uncounted"}),
        ((40, 60, 40), "ngram", None, set()),  # which guesses now and then
        ((40, 60, 1), "ngram", None, {"accepted_otherwise"}),
        ((8, 15, 1), "ngram", 0.0, set()),  # the answers read hold such trials
        ((30, 60, 35), "ngram", 0.6, set()),
        ((30, 60, 30), "ngram", 0.6, {"accepted_otherwise"}),  # 50%, of at least 51%
    ],
)
def test_guesses_prove_themselves_by_their_number_and_how_many_came_true(
    counts: Sequence[float | None], method: str, least_copied: float | None, names: set[str]
) -> None:
    acceptance = 0.6 if least_copied is None else None  # 48% of two
    assert guessing_faults(counts, method, acceptance, least_copied) == names


def test_tokens_that_came_with_the_first_were_guessed_too() -> None:
    """A client that falls behind finds several tokens in a request's first chunk."""
    assert guessing_faults((205, 410, 197), "draft_model", 0.6, None, first=12) == set()


TEXTS = ((5, 6), (5, 6), (7, 4), (5, 6), (7, 4), (6, 5), (9, 2), (8, 3), (7, 4))
"""Of each answer of 12 tokens in a trial on file: its drafts of two tokens, and those accepted."""


@each(
    ("accepted", "texts", "names"),
    [
        (
            42,
            TEXTS,
            set(),
        ),  # 35.6%: as many independent drafts would have 35.8%, of predicted 57.5%
        (39, TEXTS, {"accepted_otherwise"}),  # 33.1%, of at least 33.8%
        (42, TEXTS[-1:], set()),  # one text proves nothing
        (22, ((8, 11),) * 2 + ((19, 0),) * 2, set()),  # two texts well guessed, two not at all
        (22, ((15, 5), (15, 5), (15, 6), (14, 6)), {"accepted_otherwise"}),  # all of them badly
    ],
)
def test_what_was_guessed_is_held_against_what_texts_differ_by(
    accepted: int, texts: Sequence[tuple[int, int]], names: set[str]
) -> None:
    point = make_point(
        "draft",
        flags={"speculative-config": {"method": "draft_model", "num_speculative_tokens": 2}},
    )
    found = [
        make_record(
            [(11, 1), *((11 + i, 1) for i in range(1, drafts)), (11 + drafts, 1 + came_true)],
            sent_s=10,
        )
        for drafts, came_true in texts
    ]
    assert (
        faults_of_guesses(found, point, (59, 118, accepted), 0.683) & {"accepted_otherwise"}
        == names
    )


def guessing_faults(
    counts: Sequence[float | None],
    method: str,
    acceptance: float | None,
    least_copied: float | None,
    first: int = 1,
) -> set[str]:
    """The faults of a trial of 20 answers of 21 tokens, of which the first chunk holds `first`."""
    config = {"method": method, "num_speculative_tokens": 2}
    point = make_point("draft", flags={"speculative-config": config})
    found = [
        make_record([(t, first), (t + 1, 21 - first)], sent_s=t - 1)
        for t in np.linspace(11, 18, 20)
    ]
    return faults_of_guesses(found, point, counts, acceptance, least_copied)


def faults_of_guesses(
    found: list[RequestRecord],
    point: Point,
    counts: Sequence[float | None],
    acceptance: float | None,
    least_copied: float | None = None,
) -> set[str]:
    """The faults of a trial whose engine counts so many drafts, drafted and accepted tokens."""
    counters = (metrics.SPEC_DRAFTS, metrics.SPEC_DRAFTED, metrics.SPEC_ACCEPTED)
    shown = {name: n for name, n in zip(counters, counts, strict=True) if n is not None}
    engine = make_engine(found, True)
    engine = replace(engine, values={**engine.values, **shown})
    expected = Expected(
        acceptance={} if acceptance is None else {point.key: acceptance},
        least_copied={} if least_copied is None else {point.key: least_copied},
    )
    return faults(make_trial(found, engine=engine, point=point), expected)


@each(
    ("files_sha256", "method", "quantized", "zeros", "names"),
    [
        ("a1", "compressed-tensors", True, "0.0113", set()),
        ("a1", "None", False, "0.0113", set()),
        ("b2", "compressed-tensors", True, "0.0113", {"other_files"}),  # BF16 filed as `w8a8`
        (None, "compressed-tensors", True, "0.0113", {"other_files"}),
        ("a1", "None", True, "0.0113", {"not_quantized"}),
        ("a1", "fp8", False, "0.0113", {"quantized"}),
        ("a1", None, True, "0.0113", {"quantization_unknown"}),
        ("a1", "compressed-tensors", True, "0.9770", {"random_zeros"}),
        ("a1", "compressed-tensors", True, None, {"random_zeros"}),
    ],
)
def test_the_engine_must_say_that_it_loaded_the_manifests_weights(
    files_sha256: str | None,
    method: str | None,
    quantized: bool,
    zeros: str | None,
    names: set[str],
) -> None:
    trial = showing(
        CLEAN,
        SERVED={"files_sha256": files_sha256} if files_sha256 else {},
        ENGINE_CONFIG={"quantization": method} if method else {},
        ZEROS={"8": zeros} if zeros else {},
    )
    weights = Served(files_sha256="a1", quantized=quantized, random=True)
    assert faults(trial, Expected(served={"off": weights}, template_tokens=1)) == names


WEIGHTS = Expected(served={"off": Served(files_sha256="a1", quantized=True)}, template_tokens=1)


@each(
    ("flags", "arguments", "names"),
    [
        ({"block-size": 2}, {}, set()),
        ({"block-size": 4}, {}, {"flag_not_echoed"}),
        ({"enforce-eager": True}, {}, {"flag_not_echoed"}),
        ({"max-num-seqs": 4}, {"max_num_seqs": "4"}, set()),
        ({"max-num-seqs": 4}, {"max_num_seqs": "8"}, {"flag_given_otherwise"}),
        ({"max-num-seqs": 4}, {}, {"flag_given_otherwise"}),
        ({"max-num-seqs": 4}, None, set()),  # an old run, which did not read them
        ({"scheduling-policy": "priority"}, {}, {"flag_given_otherwise"}),
        ({"max-loras": 1}, {}, set()),  # a default, which it does not name
        ({"async-scheduling": False}, {"async_scheduling": "False"}, set()),
        ({"async-scheduling": False}, {}, {"flag_given_otherwise"}),
        ({"attention-backend": "TRITON_ATTN"}, {"attention_backend": "TRITON_ATTN"}, set()),
        ({"attention-backend": "A"}, {"attention_backend": "B"}, {"flag_given_otherwise"}),
        ({}, {"async_scheduling": "False"}, {"flag_given_unasked"}),
    ],
)
def test_the_engine_must_say_the_flags_that_were_set(
    flags: dict[str, Any], arguments: dict[str, str] | None, names: set[str]
) -> None:
    """A `priority` engine that serves first come, first served, for one."""
    more = {} if arguments is None else {"ENGINE_ARGUMENTS": arguments}
    config, files = {"quantization": "fp8"}, {"files_sha256": "a1"}
    trial = showing(CLEAN, flags, SERVED=files, ENGINE_CONFIG=config, **more)
    assert faults(trial, WEIGHTS) == names


@each(
    ("model", "adapter", "names"),
    [
        ("tenant-0", "tenant-0", set()),
        (None, "tenant-0", set()),  # an old record, which has no names
        ("base", "tenant-0", {"other_model_answered"}),  # the base model filed as `one`
        ("tenant-1", None, {"other_model_answered"}),
    ],
)
def test_every_answer_must_come_from_the_adapter_that_was_asked(
    model: str | None, adapter: str | None, names: set[str]
) -> None:
    trial = replace(make_trial(some(1, model=model)), asked=[Asked(4, 2, adapter)] * 50)
    assert faults(trial, Expected(model="base", template_tokens=1)) == names


@each(
    ("kind", "increase", "names"),
    [
        ("absent", None, set()),
        ("absent", 0.0, {"counter_present"}),
        ("rises", 2.0, set()),
        ("stays", 0.0, set()),
        ("rises", 0.0, {"counter_stayed"}),
        ("stays", 2.0, {"counter_rose"}),
        ("stays", None, {"counter_missing"}),
        ("rises", None, {"counter_missing"}),
    ],
)
def test_a_counter_must_be_as_the_labs_evidence_says(
    kind: Any, increase: float | None, names: set[str]
) -> None:
    evidence = Evidence(arm=Arm(), kind=kind, metric=metrics.PREEMPTIONS)
    values = {} if increase is None else {metrics.PREEMPTIONS: increase}
    trial = make_trial(CLEAN, engine=Snapshot(values))
    assert faults(trial, Expected(evidence=[evidence])) == names


def test_an_echo_may_be_asked_of_the_variants_own_flag() -> None:
    """What a changed setting asks for is then what the engine must say."""
    (asked,) = echoes(metrics.ENGINE_CONFIG, "watermark", {"off": "--watermark"})
    assert asked.expected(make_point()) == ""
    for share, names in (("0.05", set()), ("0.01", {"label_differs"})):
        trial = showing(CLEAN, {"watermark": 0.05}, ENGINE_CONFIG={"watermark": share})
        assert faults(trial, Expected(evidence=[asked])) == names


PIECES = Expected(evidence=[Evidence(arm=Arm(), kind="pieces", metric="prefill_pieces")])


@each("meanwhile", [2, 3, 7, 8])
def test_a_long_prompt_comes_in_as_many_pieces_as_its_budget_says(meanwhile: int) -> None:
    """4 pieces expected: from 2.8 to 7.7 are taken, for the steps until the engine has it."""
    point = make_point(
        load="contended:1/2",
        flags={"max-num-batched-tokens": 26},
        intruder=Intruder(prompt_tokens=100),
    )
    visit = make_record([(12.0, 1)], sent_s=11.0, index=3)
    times = [10.9, *(11.1 + 0.1 * i for i in range(meanwhile)), 12.1]
    beside = make_record([(t, 1) for t in times], index=0)
    trial = make_trial([beside, visit], point=point, engine=Snapshot({}))
    assert faults(trial, PIECES) == (set() if meanwhile in (3, 7) else {"other_pieces"})
    alone = make_trial([beside], point=point, engine=Snapshot({}))
    assert faults(alone, PIECES) == {"no_pieces"}  # nothing seen proves nothing


def test_a_prompt_on_its_way_to_an_engine_of_short_steps_sees_more_of_them() -> None:
    """10 ms and 3 us a token, at 5 ms a step: 5.6 steps and one beside the piece itself."""
    point = make_point(
        load="contended:1/2",
        flags={"max-num-batched-tokens": 8192},
        intruder=Intruder(prompt_tokens=6000),
    )
    for meanwhile, names in ((1, set()), (7, set()), (9, {"other_pieces"})):
        times = [*(11.0 + 0.005 * i for i in range(200 + meanwhile)), 12.2]
        visit = make_record([(times[-2] + 0.001, 1)], sent_s=times[199] + 0.001, index=3)
        beside = make_record([(t, 1) for t in times], index=0)
        trial = make_trial([beside, visit], point=point, engine=Snapshot({}))
        assert faults(trial, PIECES) == names, meanwhile


# -------------------------------------------------------------------------------- what they block


def test_where_tokens_come_gathered_their_times_allow_no_verdict_but_their_number_does() -> None:
    gathered = checked(BUNDLED, TRIPLED)
    gathered = [c.model_copy(update={"point": "on"}) for c in gathered]
    assert judged(FASTER, *gathered).outcome == "helps"  # throughput counts tokens
    times = {
        point: {r: {"tpot_mean_s": row["output_tokens_per_s"]} for r, row in rows.items()}
        for point, rows in FASTER.items()
    }
    judgement = judged(times, *gathered, metric="tpot_mean_s")
    assert (judgement.outcome, judgement.why) == ("not valid", "several tokens a chunk")
    elsewhere = [c.model_copy(update={"point": "third"}) for c in gathered]
    assert judged(times, *elsewhere, metric="tpot_mean_s").outcome == "hurts"


def test_guesses_come_several_to_a_chunk() -> None:
    guessing: dict[str, Any] = {"speculative-config": {"method": "ngram"}}
    trial = make_trial(BUNDLED, point=make_point(flags=guessing), engine=make_engine(BUNDLED))
    assert "several tokens a chunk" not in {c.name for c in caveats_of(trial, Expected())}


@each(
    ("values", "slow"),
    [
        ([74.0, 100.0, 101.0], True),
        ([76.0, 100.0, 101.0], False),
        ([100.0, 74.0, 101.0], False),
        ([10.0, 100.0], False),  # two cannot tell which is odd
        ([10.0, None, 100.0], False),
    ],
)
def test_first_trial_that_stands_out_is_told(values: list[float | None], slow: bool) -> None:
    assert bool(check("repeats", "on", rates(on=values)["on"])) is slow


def test_two_factors_at_once_allow_no_verdict_unless_the_engine_couples_them() -> None:
    on, one, two = (
        make_point(flags={"enable-prefix-caching": caching, "block-size": block})
        for caching, block in ((True, 32), (False, 32), (False, 16))
    )
    assert check("sides", on.key, make_claim(), on, one) == []
    (caveat,) = check("sides", on.key, make_claim(), on, two)
    assert caveat.blocks
    assert caveat.name.endswith("--block-size, --enable-prefix-caching")
    (caveat,) = check("sides", on.key, make_claim(coupled="it must"), on, two)
    assert (caveat.text, caveat.blocks) == ("it must", False)


@each(
    ("share", "on_gpus", "flags", "finds"),
    [
        (None, True, {}, []),
        (0.9, True, {}, []),
        (0.97, True, {}, [("server_busy_that_may_be_several", 4)]),
        (1.2, True, {"api-server-count": 4}, [("server_busy_that_may_be_several", 8)]),
        (0.99, True, {"enable-lora": True}, [("server_busy", None)]),  # vLLM has one server then
        (0.97, False, {}, [("server_busy", None)]),  # more would take cores from the engine
    ],
)
def test_a_server_that_has_no_time_left_is_a_caveat_that_withholds_no_verdict(
    share: float | None, on_gpus: bool, flags: Any, finds: list[tuple[str, int | None]]
) -> None:
    work = OtherWork(0.0, 0.01, 0.5, 0, server_core_share=share)
    trial = replace(make_trial(CLEAN, point=make_point(flags=flags)), other_work=work)
    expected = Expected(on_gpus=on_gpus)
    rows = [row for row in CHECKS["requests"] if row.name == SERVER_BUSY]
    told = [(row, figures) for row in rows for figures in row.found(trial, expected)]
    assert [(row.found.__name__, figures.get("servers")) for row, figures in told] == finds
    assert not any(row.blocks for row in rows)
    assert all(figures["busy"] == share for _, figures in told)
    assert SERVER_BUSY not in {c.name for c in disturbances_of(trial, expected)}
