"""What is wrong with a trial, each fault alone and at its limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from labs.judging.judge import Caveat
from labs.judging.measure import Trial
from labs.judging.validity import caveats_of, confounded, first_trial_slow, ttft_agrees
from labs.lab import Arm, Evidence
from loadtests.records import RequestRecord
from loadtests.workload import Chat, Intruder, Prefix
from serving import metrics
from serving.metrics import Histogram, Snapshot
from tests.unit.builders import make_claim, make_point, make_record, make_trial
from tests.unit.test_judge import FASTER, judged, rates

INF = float("inf")
CHAT = Chat(turns=2, grows_tokens=4)
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
}
SEEN = Histogram((0.05, 0.1, 0.2, 0.4, INF), (0, 0, 50, 50, 50), 7.0, 50)
CLEAN = [
    make_record([(t + 0.15, 1), (t + 0.2, 1)], sent_s=t, scheduled_s=t - 0.001)
    for t in np.linspace(10, 19, 50)
]


def checked(
    records: list[RequestRecord] | None = None,
    values: Mapping[str, float] = VALUES,
    seen: Histogram = SEEN,
    caching: str = "False",
    engine: bool = True,
    **summary: Any,
) -> list[Caveat]:
    snapshot = Snapshot(dict(values), {metrics.TTFT: seen}, {CACHE: {"caching": caching}})
    records = CLEAN if records is None else records
    trial: Trial = make_trial(records, engine=snapshot if engine else None, **summary)
    return caveats_of(trial, EVIDENCE)


def some(n: int, **fields: Any) -> list[RequestRecord]:
    """The clean trial with its first n records changed."""
    return [replace(r, **fields) for r in CLEAN[:n]] + CLEAN[n:]


TRIPLED = {**VALUES, metrics.GENERATION_TOKENS: 150.0}
BUNDLED = [
    replace(r, chunks=[r.chunks[0], (r.chunks[1][0], 2)], output_tokens=3, asked_tokens=3)
    for r in CLEAN
]


A_FEW = BUNDLED[:5] + CLEAN[5:]
A_FEW_MORE = {**VALUES, metrics.GENERATION_TOKENS: 105.0}


def test_clean_trial_has_no_caveat() -> None:
    assert checked() == []
    assert checked(engine=False) == []


@pytest.mark.parametrize(
    ("name", "blocks", "changes"),
    [
        ("errors", True, {"records": some(1, error="reset")}),
        ("nothing measured", True, {"records": some(50, in_window=False)}),
        ("load process lost", True, {"lost_share": 0.5}),
        ("ran out of requests", False, {"exhausted": True}),
        ("generator lagged", True, {"records": some(3, scheduled_s=9.0, sent_s=9.1)}),
        ("generator's loop lagged", True, {"loop_lag_p99_s": 0.021}),
        ("fell behind the schedule", True, {"planned": 100, "sent": 94}),
        ("token counts differ", True, {"records": some(1, chunks=[(10.15, 1)])}),
        ("lengths differ", False, {"records": some(1, asked_tokens=3)}),
        ("several tokens a chunk", True, {"records": BUNDLED, "values": TRIPLED}),
        ("several tokens a chunk", False, {"records": A_FEW, "values": A_FEW_MORE}),
        ("warm prefix cache", True, {"values": {**VALUES, HITS: 50 * 65.0}}),
        ("client and engine disagree", True, {"values": {**VALUES, metrics.REQUESTS: 51}}),
        ("client and engine disagree", True, {"values": {**VALUES, metrics.GENERATION_TOKENS: 99}}),
        (
            "client and engine disagree",
            True,
            {"seen": Histogram(SEEN.le, (50, 50, 50, 50, 50), 1.0, 50)},
        ),
        ("treatment not applied", True, {"values": {**VALUES, metrics.PREEMPTIONS: 1}}),
        ("treatment not applied", True, {"values": {**VALUES, metrics.PROMPT_TOKENS: 0}}),
        ("treatment not applied", True, {"caching": "True"}),
    ],
)
def test_caveat(name: str, blocks: bool, changes: dict[str, Any]) -> None:
    (caveat,) = checked(**changes)
    assert (caveat.name, caveat.blocks, caveat.point) == (name, blocks, "off/short/concurrent-1")
    assert caveat.text


@pytest.mark.parametrize(
    "changes",
    [
        {"records": some(2, scheduled_s=9.0, sent_s=9.1)},  # 4 % late
        {"records": [replace(r, scheduled_s=r.sent_s - 0.0049) for r in CLEAN]},  # up to 5 ms
        {"loop_lag_p99_s": 0.019},
        {"planned": 100, "sent": 95},
    ],
)
def test_just_good_enough_is_no_caveat(changes: dict[str, Any]) -> None:
    assert checked(**changes) == []


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
    assert caveats_of(make_trial(BUNDLED, point=make_point(flags=guessing)), ()) == []


@pytest.mark.parametrize("shared", [{"prefix": Prefix(tokens=4)}, {"chat": CHAT}])
def test_what_is_shared_may_be_warm(shared: dict[str, Any]) -> None:
    values = {**VALUES, HITS: 50 * 500.0}
    engine = Snapshot(values, {metrics.TTFT: SEEN}, {})
    assert caveats_of(make_trial(CLEAN, engine=engine, point=make_point(**shared)), ()) == []


def test_one_error_in_a_hundred_is_told_but_does_not_block() -> None:
    (caveat,) = checked([*some(1, error="reset"), *CLEAN])
    assert (caveat.name, caveat.blocks) == ("errors", False)


def shows(evidence: Evidence, trial: Trial) -> bool:
    caveats = caveats_of(trial, [evidence])
    assert all(c.blocks for c in caveats)
    return "treatment not applied" not in {c.name for c in caveats}


def test_absent_is_not_there_rather_than_zero() -> None:
    none = Evidence(arm=Arm(), kind="absent", metric=metrics.SPEC_DRAFTS)
    assert shows(none, make_trial(CLEAN, engine=Snapshot({})))
    assert not shows(none, make_trial(CLEAN, engine=Snapshot({metrics.SPEC_DRAFTS: 0.0})))


@pytest.mark.parametrize(
    ("tokens_meanwhile", "shown"), [(2, False), (3, True), (7, True), (8, False)]
)
def test_a_long_prompt_comes_in_as_many_pieces_as_its_budget_says(
    tokens_meanwhile: int, shown: bool
) -> None:
    """4 pieces expected: from 2.8 to 7.7 are taken, for the steps until the engine has it."""
    point = make_point(
        load="contended:1/2",
        flags={"max-num-batched-tokens": 26},
        intruder=Intruder(prompt_tokens=100),
    )
    visit = make_record([(12.0, 1)], sent_s=11.0, index=3)
    times = [10.9, *(11.1 + 0.1 * i for i in range(tokens_meanwhile)), 12.1]
    beside = make_record([(t, 1) for t in times], index=0)
    pieces = Evidence(arm=Arm(), kind="pieces", metric="prefill_pieces")
    trial = make_trial([beside, visit], point=point, engine=Snapshot({}))
    assert shows(pieces, trial) is shown
    alone = make_trial([beside], point=point, engine=Snapshot({}))
    assert not shows(pieces, alone)  # nothing seen proves nothing


def test_a_prompt_on_its_way_to_an_engine_of_short_steps_sees_more_of_them() -> None:
    """10 ms and 3 us a token, at 5 ms a step: 5.6 steps and one beside the piece itself."""
    point = make_point(
        load="contended:1/2",
        flags={"max-num-batched-tokens": 8192},
        intruder=Intruder(prompt_tokens=6000),
    )
    pieces = Evidence(arm=Arm(), kind="pieces", metric="prefill_pieces")
    for meanwhile, shown in ((1, True), (7, True), (9, False)):
        times = [*(11.0 + 0.005 * i for i in range(200 + meanwhile)), 12.2]
        visit = make_record([(times[-2] + 0.001, 1)], sent_s=times[199] + 0.001, index=3)
        beside = make_record([(t, 1) for t in times], index=0)
        trial = make_trial([beside, visit], point=point, engine=Snapshot({}))
        assert shows(pieces, trial) is shown, meanwhile


def test_counter_that_the_engine_does_not_have_proves_nothing() -> None:
    without = {n: v for n, v in VALUES.items() if n != metrics.PREEMPTIONS}
    assert [c.name for c in checked(values=without)] == ["treatment not applied"]


@pytest.mark.parametrize(
    ("client_median_s", "agrees"),
    [
        (0.15, True),  # the median's own bucket is 0.1 to 0.2
        (0.06, True),  # a neighbour
        (0.04, False),
        (0.39, True),
        (0.409, True),  # and 10 ms for transport
        (0.42, False),
    ],
)
def test_ttft_agrees_with_the_engines_median_bucket(client_median_s: float, agrees: bool) -> None:
    assert ttft_agrees(SEEN, client_median_s) is agrees


def test_ttft_agrees_where_the_engine_cannot_tell() -> None:
    assert ttft_agrees(Histogram(), 5.0)
    assert ttft_agrees(Histogram((0.1, INF), (1, 9), 9.0, 9), 500.0)


@pytest.mark.parametrize(
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
    caveats = first_trial_slow(rates(on=values)["on"], "on")
    assert [c.name for c in caveats] == (["slow first trial"] if slow else [])


def test_two_factors_at_once_allow_no_verdict_unless_the_engine_couples_them() -> None:
    on, one, two = (
        make_point(flags={"enable-prefix-caching": caching, "block-size": block})
        for caching, block in ((True, 32), (False, 32), (False, 16))
    )
    assert confounded(make_claim(), on, one) == []
    (caveat,) = confounded(make_claim(), on, two)
    assert caveat.blocks
    assert caveat.name.endswith("--block-size, --enable-prefix-caching")
    (caveat,) = confounded(make_claim(coupled="it must"), on, two)
    assert not caveat.blocks
    assert caveat.text == "it must"
