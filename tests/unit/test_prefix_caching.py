"""What a run says of prefix caching beyond its claims."""

from __future__ import annotations

from pathlib import Path

import pytest

from labs import LABS
from labs.harness.storage.writing import write_gzip
from labs.prefix_caching.facts import facts
from serving import metrics
from serving.metrics import Histogram, Snapshot
from tests.unit.builders import make_lab, make_workload
from tests.unit.judged import context, judged, judged_run, played, told_of

LAB = LABS["prefix-caching"].at("cpu", quick=False).model_copy(update={"requests": 64})


def test_ttft_is_split_by_the_engines_own_clock(tmp_path: Path) -> None:
    lab = make_lab(workloads=(make_workload("concurrent:1", "concurrent:4", name="share-90"),))
    found = context(tmp_path, lab, {})

    def engine(queue_s: float, prefill_s: float) -> Snapshot:
        one = {metrics.QUEUE_TIME: queue_s, metrics.PREFILL_TIME: prefill_s}
        return Snapshot({}, {n: Histogram((1.0,), (2,), 2 * s, 2) for n, s in one.items()}, {})

    assert not facts(judged_run(found)).alone.prefill_s.known
    played(found, "off/share-90/concurrent-1", engine=engine(0.001, 0.5))
    played(found, "off/share-90/concurrent-4", engine=engine(1.5, 0.6))
    played(found, "on/share-90/concurrent-1", engine=engine(0.001, 0.05))
    split = facts(judged_run(found))
    assert [split.alone.queue_s.value, split.alone.prefill_s.value] == [0.001, 0.5]
    assert [split.four.queue_s.value, split.four.prefill_s.value] == [1.5, 0.6]
    assert [split.cached.queue_s.value, split.cached.prefill_s.value] == [0.001, 0.05]


@pytest.mark.parametrize(
    ("shared_ms", "salted_ms", "tells", "passed"),
    [
        ((20, 21, 19), (100, 101, 99), ("yes", "no"), True),
        ((20, 21, 19), (20, 21, 19), ("yes", "yes"), False),
        # without a salt nothing tells either, for sure or perhaps: there is nothing to hide
        ((98, 98.1, 97.9), (100, 101, 99), ("no", "no"), None),
        ((60, 110, 90), (100, 101, 99), ("open", "no"), None),
        ((98, 98.1, 97.9), (20, 21, 19), ("no", "yes"), False),
        ((20, 21, 19), (60, 110, 90), ("yes", "open"), None),  # may be 1, and may be half
    ],
)
def test_a_stranger_tells_by_timing_or_not(
    shared_ms: tuple[float, ...],
    salted_ms: tuple[float, ...],
    tells: tuple[str, str],
    passed: bool | None,
    tmp_path: Path,
) -> None:
    run = judged_run(context(tmp_path, LAB, {}))
    fresh = [0.1, 0.1, 0.1]
    took_s = {
        "shared, known": [ms / 1000 for ms in shared_ms],
        "shared, fresh": fresh,
        "salted, known": [ms / 1000 for ms in salted_ms],
        "salted, fresh": fresh,
    }
    write_gzip(run.folder.probe_file("salt-quick", "on"), {"took_s": took_s, "prompt_tokens": 64})
    leak = facts(run).timing_leak
    assert leak
    assert (leak.unsalted.tells, leak.salted.tells) == tells
    assert leak.passed is passed
    (finding,) = told_of(run).findings
    assert finding.passed is passed


def test_a_claim_that_was_not_valid_is_no_answer(tmp_path: Path) -> None:
    found = context(tmp_path, LAB, {})
    told = told_of(judged_run(found, [judged("thrash", 1.0)]))
    assert "SO-4" not in told.answers
    assert "no points" in told.unanswered["SO-4"]
    both = [judged("ttft-share-90", 0.5), judged("thrash", 1.0), judged("cost", 0.99)]
    answer = told_of(judged_run(found, both)).answers["SO-4"]
    assert "0.50x (0.45 to 0.55)" in answer.brief
    assert answer.depth.startswith("<details>")
    assert answer.depth.count("\n- ") == 1  # the other claims have no points here
