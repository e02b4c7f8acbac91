"""What a run says to each question of its lab."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from labs import LABS
from labs.filing.results import Agreement, Finding, Session, Summary, write_json
from labs.findings.context import Context, JudgedRun
from labs.findings.continuous_batching import both_ends, one_stream, ridge
from labs.findings.parts import Conclusion, answers, parts_of
from labs.findings.prefix_caching import sharing, where_to_look
from labs.findings.weight_quantization import phases
from labs.judging.judge import Effect, Interval, Judgement
from labs.lab import Lab, Variant
from serving import metrics
from serving.metrics import Histogram, Snapshot
from tests.unit.builders import PREDICTION, make_lab, make_workload
from tests.unit.test_findings import context, played


def judged_run(context: Context, judgements: Sequence[Judgement] = ()) -> JudgedRun:
    values = context.values.items()
    return JudgedRun.of(context, Summary(
        measurements={k: {r: dict(row) for r, row in of.items()} for k, of in values},
        pooled={},
        judgements=list(judgements), forecasts=[], caveats=[], failed={}, missing=0,
    ))  # fmt: skip


def judged(claim: str, value: float, **fields: Any) -> Judgement:
    ratio = Interval(value=value, low=value / 1.1, high=value * 1.1, n=3)
    plain: dict[str, Any] = {
        "claim": claim, "title": claim, "metric": "ttft_mean_s", "treatment": "", "baseline": "",
        "outcome": "helps", "expected": True, "prediction": PREDICTION, "prediction_held": True,
        "effect": Effect(ratio=ratio, floor=0.01, spread=0.01), "why": "",
    }  # fmt: skip
    return Judgement(**{**plain, **fields})


@pytest.mark.parametrize("lab", LABS.values(), ids=LABS)
def test_every_question_of_a_lab_has_an_answer_and_no_other(lab: Lab) -> None:
    assert parts_of(lab.name).answers.keys() == set(lab.answers)


@pytest.mark.parametrize("lab", LABS.values(), ids=LABS)
def test_a_run_of_which_nothing_came_invents_nothing(lab: Lab, tmp_path: Path) -> None:
    """What a cache holds is arithmetic all the same, and says so."""
    given = answers(judged_run(context(tmp_path, lab.model_copy(update={"requests": 64}), {})))
    assert given.keys() <= {"KV-2", "KV-7"}
    assert "measured" not in given.get("KV-7", "")


def test_a_claim_that_was_not_valid_is_no_answer(tmp_path: Path) -> None:
    found = context(tmp_path, make_lab(), {})
    invalid = judged("ttft-share-50", 0.5, outcome="not valid")
    assert sharing(judged_run(found, [invalid])) is None
    text = sharing(judged_run(found, [judged("ttft-share-50", 0.5), judged("thrash", 1.0)]))
    assert text == (
        "The more is shared: TTFT is 0.50x (0.45 to 0.55) with half of the prompt shared."
        " TTFT with more prefixes than the cache holds: 1.00x (0.91 to 1.10)."
    )


def test_one_repeat_is_told_as_one(tmp_path: Path) -> None:
    one = Effect(ratio=Interval(value=0.5, low=None, high=None, n=1), floor=None, spread=None)
    found = judged_run(context(tmp_path, make_lab(), {}), [judged("ttft-share-50", 1, effect=one)])
    text = sharing(found)
    assert (
        text == "The more is shared: TTFT is 0.50x (of one repeat) with half of the prompt shared."
    )


def swept(home: Path, intensities: tuple[float, float]) -> JudgedRun:
    lab = make_lab(variants=(Variant(name="base"),), claims=(), evidence=())
    values = {
        f"base/short/concurrent-{users}": {"intensity": i, "tpot_mean_s": 0.004 * users}
        for users, i in zip((1, 2), intensities, strict=True)
    }
    return judged_run(context(home, lab, values))


def test_the_side_of_the_ridge_is_told_by_the_intensities(tmp_path: Path) -> None:
    """10 MFLOP/s over 1 MB/s is a ridge of 10 FLOP a byte; a step reads 2 bytes for 2 FLOP."""
    below = ridge(swept(tmp_path, (1, 9)))
    assert below
    assert "1 at 1 in flight, 9 at 2" in below
    assert "ridge is 10, a batch of about 10: memory bounds both." in below
    across = ridge(swept(tmp_path / "b", (1, 11)))
    assert across
    assert "memory bounds the first, arithmetic the last" in across


def test_one_stream_is_held_against_the_weights_and_the_bandwidth(tmp_path: Path) -> None:
    """2,000 bytes at 1 MB/s are 500 steps a second; 4 ms a token are half of that."""
    text = one_stream(swept(tmp_path, (1, 2)))
    assert text
    assert "at most 500 tok/s. Measured: 250 tok/s (1 / TPOT), 50% of it." in text


def test_ttft_is_split_by_the_engines_own_clock(tmp_path: Path) -> None:
    lab = make_lab(workloads=(make_workload("concurrent:1", "concurrent:4", name="share-90"),))
    found = context(tmp_path, lab, {})

    def engine(queue_s: float, prefill_s: float) -> Snapshot:
        one = {metrics.QUEUE_TIME: queue_s, metrics.PREFILL_TIME: prefill_s}
        return Snapshot({}, {n: Histogram((1.0,), (2,), 2 * s, 2) for n, s in one.items()}, {})

    assert where_to_look(judged_run(found)) is None
    played(found, "off/share-90/concurrent-1", engine=engine(0.001, 0.5))
    played(found, "off/share-90/concurrent-4", engine=engine(1.5, 0.6))
    played(found, "on/share-90/concurrent-1", engine=engine(0.001, 0.05))
    text = where_to_look(judged_run(found))
    assert text
    assert "nothing cached, 1 ms and 500 ms; four at once, 1.5 s and 600 ms; one" in text
    assert "its prefix cached, 1 ms and 50 ms." in text


@pytest.mark.parametrize(
    ("decode_ms", "prefill_ms", "said"),
    [(5, 100, "decode runs 2.00x and prefill 1.00x as fast. So they speed up decode and not"),
     (5, 50, "prefill 2.00x as fast. So on this machine the bytes alone explain neither"),
     (12, 100, "decode runs 0.83x")],
)  # fmt: skip
def test_fewer_bytes_are_held_against_both_phases(
    decode_ms: float, prefill_ms: float, said: str, tmp_path: Path
) -> None:
    lab = make_lab(
        variants=(Variant(name="bf16"), Variant(name="w8a8", weights="w8a8")), claims=(),
        workloads=(make_workload(name="decode"), make_workload(name="prefill")), evidence=(),
    )  # fmt: skip
    values = {
        "bf16/decode/concurrent-1": {"tpot_mean_s": 0.010},
        "bf16/prefill/concurrent-1": {"ttft_mean_s": 0.100},
        "w8a8/decode/concurrent-1": {"tpot_mean_s": decode_ms / 1000},
        "w8a8/prefill/concurrent-1": {"ttft_mean_s": prefill_ms / 1000},
    }
    text = phases(judged_run(context(tmp_path, lab, values, halved=["w8a8"])))
    assert text
    assert "With 0.50 of the bytes (`w8a8`)" in text
    assert said in text


@pytest.mark.parametrize(
    ("prometheus", "said"), [(9, "do not agree on requests"), (8, "count the same"),
                             (None, "count the same")],
)  # fmt: skip
def test_counts_that_differ_are_told(prometheus: int | None, said: str, tmp_path: Path) -> None:
    lab = make_lab(variants=(Variant(name="base"),), claims=(), evidence=())
    ends = {"client_ttft_mean_s": 0.012, "engine_ttft_mean_s": 0.010}
    found = context(tmp_path, lab, {f"base/short/concurrent-{n}": ends for n in (1, 2)})
    assert both_ends(judged_run(found)) is None
    counts = Agreement(what="requests", records=8, prometheus=prometheus, engine=8)
    session = Session(
        engine_start_s=1, load_s=1, wall_s=3, resident=True, agreement=[counts], prometheus=None
    )
    write_json(found.folder.path / "session.json", session)
    text = both_ends(judged_run(found))
    assert text
    assert said in text
    assert "mean TTFT is 2 ms to 2 ms the longer" in text


def test_facts_are_computed_once_for_the_finding_and_the_answers(tmp_path: Path) -> None:
    calls = []

    def facts(run: Context) -> str:
        calls.append(run)
        return "the facts"

    count = Conclusion("count", facts, lambda said: Finding(title=said))
    run = context(tmp_path, make_lab(findings=("count",)), {})
    assert count.finding(run).title == "the facts"
    assert count.facts_of(judged_run(run)) == "the facts"
    assert len(calls) == 1
    left_out = replace(run, lab=make_lab())
    assert count.facts_of(judged_run(left_out)) is None
