"""What a run says of its steps, of the ridge, of one stream and of both ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from labs.continuous_batching.facts import Facts, facts
from labs.harness.analysis.quantity import Quantity
from labs.harness.spec import theory
from labs.harness.spec.lab import Variant
from labs.harness.storage.recorded import Agreement, Session
from labs.harness.storage.writing import write_json
from tests.unit.builders import SHAPE, make_lab, make_workload
from tests.unit.judged import context, judged, judged_run


def swept(home: Path, *rows: dict[str, Any], **fields: Any) -> Facts:
    """A sweep over 1, 2, 4 .. in flight with these figures."""
    loads = [f"concurrent:{2**i}" for i in range(len(rows))]
    workloads = (make_workload(*loads),)
    lab = make_lab(
        variants=(Variant(name="base"),), workloads=workloads, claims=(), evidence=(), **fields
    )
    values = {
        f"base/short/{load.replace(':', '-')}": row for load, row in zip(loads, rows, strict=True)
    }
    return facts(judged_run(context(home, lab, values), [judged("static", 1.9)]))


@pytest.mark.parametrize(
    ("few", "many", "sides"),
    [(1, 9, ("bandwidth", "bandwidth")), (1, 11, ("bandwidth", "arithmetic")),
     (11, 20, ("arithmetic", "arithmetic"))],
)  # fmt: skip
def test_the_side_of_the_ridge_is_that_of_the_intensities(
    few: float, many: float, sides: tuple[str, str], tmp_path: Path
) -> None:
    """10 MFLOP/s over 1 MB/s is a ridge of 10 FLOP a byte; a step reads 2 bytes for 2 FLOP."""
    ridge = swept(tmp_path, {"intensity": few}, {"intensity": many}).ridge
    assert ridge
    assert (ridge.flop_per_byte, ridge.batch) == (10, 10)
    assert (ridge.few.users, ridge.few.flop_per_byte.value) == (1, few)
    assert (ridge.many.users, ridge.many.flop_per_byte.value) == (2, many)
    assert (ridge.few.nearer_ceiling, ridge.many.nearer_ceiling) == sides
    assert ridge.is_crossed == (len({*sides}) > 1)


def test_one_load_has_no_side_of_the_ridge(tmp_path: Path) -> None:
    assert swept(tmp_path, {"intensity": 1.0}, {}).ridge is None


def test_one_stream_is_held_against_the_weights_and_the_bandwidth(tmp_path: Path) -> None:
    """2,000 bytes at 1 MB/s are 500 steps a second; 4 ms a token are half of that."""
    found = swept(tmp_path, {"tpot_mean_s": 0.004})
    one = found.one_stream
    assert one
    assert (one.most_per_s.value, one.measured_per_s.value, one.share.value) == (500, 250, 0.5)
    assert found.static_predicted.value == 2  # whatever came of it


def test_the_time_of_a_step_is_split_at_each_load(tmp_path: Path) -> None:
    """A step of 20 ms at one in flight reads for 2.3 ms: neither ceiling limits it."""
    one, two = swept(
        tmp_path,
        {"tpot_mean_s": 0.020, "batch": 1.0},
        {"tpot_mean_s": 0.004, "batch": 2.0},
        {"tpot_mean_s": 0.004},  # whose batch is not known
    ).steps
    assert (one.users, one.parts.limit) == (1, "neither")
    assert (two.users, two.parts.limit) == (2, "bandwidth")
    # (2000 + 2 x 8 x 32) bytes at 1 MB/s; 2 x (2000 + 64 x 8) FLOP, and a quarter of a prefill
    assert two.parts.reading_s.value == pytest.approx(0.002512)
    flop = 2 * (2000 + 64 * 8) + theory.prefill_flops(SHAPE, 6) / 4
    assert two.parts.computing_s.value == pytest.approx(flop / 1e7)


@pytest.mark.parametrize(
    ("more_ms", "growth", "most"),
    [(2.0, "grows", 500), (-1.0, "none", -1000), (None, "unknown", None)],
)
def test_a_step_is_a_line_over_its_batch(
    more_ms: float | None, growth: str, most: float | None, tmp_path: Path
) -> None:
    """10 ms and so much more for each request in decode, of three sizes of the batch at least."""
    rows = [{"batch": float(n), "tpot_mean_s": (10 + (more_ms or 0) * n) / 1000} for n in (1, 2, 4)]
    line = swept(tmp_path, *rows[: 3 if more_ms else 2]).line
    assert line.growth == growth
    assert line.most_per_s.value == pytest.approx(most)
    if most == 500:
        assert line.fixed_s.value == pytest.approx(0.010)
        assert line.half_at.value == pytest.approx(5)


@pytest.mark.parametrize(
    ("prometheus", "engine", "agreement"),
    [(9, 8, "differ"), (0, 8, "differ"), (8, 8, "same"), (None, 8, "same"), (8, 0, "differ"),
     (8, None, "unknown")],
)  # fmt: skip
def test_counts_that_differ_are_told(
    prometheus: int | None, engine: int | None, agreement: str, tmp_path: Path
) -> None:
    ends = {"client_ttft_mean_s": 0.012, "engine_ttft_mean_s": 0.010}
    assert swept(tmp_path, ends, ends).both_ends is None  # no session has ended
    counts = Agreement(what="requests", records=8, prometheus=prometheus, engine=engine)
    session = Session(
        engine_start_s=1, load_s=1, wall_s=3, resident=True, agreement=[counts], prometheus=None
    )
    write_json(tmp_path / "run" / "session.json", session)
    both = swept(tmp_path, ends, ends).both_ends
    assert both
    assert both.agreement == agreement
    assert [longer.value for longer in both.client_longer_s] == pytest.approx([0.002, 0.002])
    # 100 tokens a second are 360,000 an hour, for one dollar
    priced = replace(both, tokens_per_s=Quantity(100, "tok/s"))
    assert priced.usd_per_million_tokens.value == pytest.approx(1 / 0.36)
