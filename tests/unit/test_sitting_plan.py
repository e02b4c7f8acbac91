"""What the labs are planned to take on a rented GPU, by their sizes."""

from __future__ import annotations

from itertools import pairwise

import pytest

from labs import FIRST
from labs.running.sitting_plan import TOGETHER_S, plan, table
from serving.gpus import CLASSES

START_S = 45.0


def test_half_an_hour_on_a_gpu_has_results_of_the_first_labs() -> None:
    """Six where engines take turns, and one more where those of a lab start together."""
    planned = {p.lab: p for p in plan(FIRST, "gpu-80", START_S)}
    assert tuple(planned) == FIRST
    assert sum(p.load_s for p in planned.values()) < 9.5 * 60
    in_turns = [p.lab for p in planned.values() if p.ends_s < 30 * 60]
    together = [p.lab for p in planned.values() if p.together_ends_s < 30 * 60]
    assert in_turns == [*FIRST[:6]]
    assert together == [*FIRST[:7]]


@pytest.mark.parametrize("scale", [f"gpu-{c.gb}" for c in CLASSES])
def test_engines_that_start_together_take_no_longer_than_in_turn(scale: str) -> None:
    planned = [*plan(FIRST, scale, START_S)]
    for before, after in pairwise(planned):
        saved_s = (after.ends_s - before.ends_s) - (after.together_ends_s - before.together_ends_s)
        assert saved_s == pytest.approx(
            after.starts * START_S - (TOGETHER_S if after.starts > 1 else START_S)
        )
    assert len(table(planned).splitlines()) == 1 + len(planned)
