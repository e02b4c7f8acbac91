"""A wall clock may jump, by a day too: it says when something was, and never how long it took."""

from __future__ import annotations

import re

import pytest

from serving.weights.models import ROOT

READS_THE_WALL_CLOCK = re.compile(r"\btime\.time(_ns)?\(|\bdatetime\.now\(")
WRITES_DOWN_A_MOMENT = {  # modules that do nothing else with the wall clock
    "bench/__main__.py",
    "labs/harness/filing/results.py",
    "labs/harness/running/run.py",
    "loadtests/load.py",
    "serving/hardware/machine.py",
}


def test_the_wall_clock_is_read_only_to_write_down_a_moment() -> None:
    reading = {
        str(path.relative_to(ROOT))
        for part in ("bench", "dashboards", "labs", "loadtests", "serving")
        for path in (ROOT / part).rglob("*.py")
        if READS_THE_WALL_CLOCK.search(path.read_text())
    }
    assert reading == WRITES_DOWN_A_MOMENT


@pytest.mark.parametrize("module", sorted(WRITES_DOWN_A_MOMENT))
def test_no_difference_is_taken_of_two_moments(module: str) -> None:
    source = (ROOT / module).read_text()
    assert not re.search(
        r"(time\.time\(\)|datetime\.now\(\w*\))\s*-|-\s*(time\.time|datetime\.now)\(", source
    )
