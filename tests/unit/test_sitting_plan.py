"""What the labs are planned to take on a rented GPU, by their sizes."""

from __future__ import annotations

import pytest

from labs import FIRST, LABS
from labs.harness.plan.session_plan import plan, table, writing_s
from labs.harness.plan.time_budget import MOST_AGAIN, PER_TRIAL_S
from serving.models.catalog import ROOT

START_S = 45.0


def test_the_page_on_gpus_tells_the_plan() -> None:
    """Written down from this plan: another size of a lab changes it."""
    planned = [*plan(tuple(dict.fromkeys([*FIRST, *LABS])), "gpu-80", START_S)]
    done = {limit: sum(p.ends_s <= 60 * limit for p in planned) for limit in (30, 31, 40, 144)}
    assert done == {30: 5, 31: 6, 40: 8, 144: len(planned)}
    said = "five labs done in 30 minutes, six in 31, eight in 40 and all 21 in 144"
    assert len(planned) == 21
    assert said in (ROOT / "docs/gpu.md").read_text()


def test_the_plan_says_when_a_lab_ends_at_the_latest() -> None:
    first, second = plan(["single-stream", "kv-quantization"], "gpu-80", START_S)
    again_s = MOST_AGAIN * (first.load_s + first.trials * PER_TRIAL_S)
    assert first.latest_s == pytest.approx(first.ends_s + again_s)
    assert second.latest_s - first.latest_s > second.takes_s
    assert table([first]).splitlines()[1].split()[-4:-2] == [f"{first.ends_s / 60:.1f}", "min"]
    assert table([first]).endswith(f"{first.latest_s / 60:.1f} min")


def test_the_plan_counts_the_writing_of_prompts() -> None:
    lab = LABS["weight-quantization"].at("gpu-80", quick=False, dummy=True)
    tokens = lab.repeats * 4096 * (128 + 250 + 2048 + 250)  # two workloads
    assert writing_s(lab) == pytest.approx(tokens / 2e6)
