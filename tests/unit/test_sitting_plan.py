"""What the labs are planned to take on a rented GPU, by their sizes."""

from __future__ import annotations

from labs import FIRST
from labs.running.sitting_plan import plan

START_S = 45.0
CORES = 16  # as a rented machine with such a GPU has


def test_half_an_hour_on_a_gpu_has_results_of_the_first_labs() -> None:
    """Where every engine starts by itself, and nothing disturbs a trial."""
    planned = {p.lab: p for p in plan(FIRST, "gpu-80", START_S, CORES)}
    assert tuple(planned) == FIRST
    assert sum(p.load_s for p in planned.values()) < 9.5 * 60
    assert [p.lab for p in planned.values() if p.ends_s < 31 * 60] == [*FIRST[:6]]
