"""Rows of figures by the names of their columns, as a page reads them and a summary keeps them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import TypeAdapter

from labs.harness.analysis.quantity import Quantity
from labs.harness.derived.tables import Row, measured, rows
from labs.harness.reports.templates import filled_text
from tests.unit.builders import make_lab, make_workload
from tests.unit.judged import context


def test_a_row_has_means_of_metrics_and_what_is_computed_of_its_point(tmp_path: Path) -> None:
    lab = make_lab(
        workloads=(
            make_workload("concurrent:1", "concurrent:2", "concurrent:4", name="w", only=("off",)),
        ),
        claims=(), evidence=(),
    )  # fmt: skip
    one, two, _ = keys = [f"off/w/concurrent-{n}" for n in (1, 2, 4)]
    run = context(tmp_path, lab, {one: {"tpot_mean_s": [0.25, 0.75]}, two: {"tpot_mean_s": 0.5}})
    assert [p.key for p in run.points] == keys
    found = rows(
        run, measured(run, run.points, "tpot_mean_s"),
        users=lambda p: Quantity(p.load.users), tpot_s="tpot_mean_s",
    )  # fmt: skip
    assert [row.name for row in found] == [one, two]
    first = found[0]
    assert (first.variant, first["users"].value, first["tpot_s"].value) == (
        "off", 1, 0.5,
    )  # fmt: skip
    said = filled_text("{% for row in rows %}{{ row.users }}: {{ row.tpot_s.brief }} {% endfor %}",
                       {"rows": found})  # fmt: skip
    assert said.text == "1: 500 ms 2: 500 ms"
    with pytest.raises(Exception, match="no attribute 'ttft_s'"):
        filled_text("{{ row.ttft_s }}", {"row": first})
    adapter = TypeAdapter(tuple[Row, ...])
    kept = adapter.dump_python(found, mode="json", exclude_defaults=True)
    assert adapter.validate_python(kept) == found
