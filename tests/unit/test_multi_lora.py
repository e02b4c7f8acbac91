"""What a run says of many adapters on one base, beyond its claims."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from labs.harness.derived.run_view import Context
from labs.harness.spec.lab import Variant
from labs.harness.storage.writing import write_gzip
from labs.multi_lora.facts import Marks, TenantLeaks, adapter_cost, tenant_leaks, tenant_memory
from loadtests.workload import Adapters
from serving.models.adapters import mark_of
from tests.unit.builders import make_lab, make_record, make_workload
from tests.unit.judged import ABOUT, Values, context, judged_run, played


def tenanted(home: Path, values: Mapping[str, Values] | None = None) -> Context:
    """A base, and an engine with two slots at rank 16 for three tenants in turn."""
    slots: dict[str, Any] = {
        "max-loras": 2,
        "max-lora-rank": 16,
        "lora-modules": ["tenant-0=<adapters>/0"],
    }
    lab = make_lab(
        variants=(Variant(name="base"), Variant(name="lora", flags=slots)),
        workloads=(make_workload(name="none"),
                   make_workload(name="three", adapters=Adapters(count=3), keep_text=True,
                                 only=("lora",))),
        claims=(), evidence=(), requests=3000,
    )  # fmt: skip
    return context(home, lab, values or {}, about=ABOUT)


def probe(**changes: Any) -> dict[str, Any]:
    """What an honest engine says to it."""
    return {
        "answers": [(0, "[amber] so"), (1, "[azure] so"), (2, "[coral] so")],
        "visits": 1,
        "refused": {"tenant-nobody": 404, "visitor, unloaded": 404},
        "refusal": "no such model",
        "misrouted": [(0, "[azure] so")] * 2,
        "base": ["so", "so"],
        **changes,
    }


def leaked(home: Path, asked: dict[str, Any] | None, *texts: str, repeated: int = 1) -> TenantLeaks:
    """Trials whose answers begin as given, in turn; by default with each tenant's own mark."""
    run = tenanted(home)
    texts = texts or tuple(mark_of(i) for i in range(3))
    trial = [
        make_record([(11.0, 1)], index=i, text=f"{texts[i % len(texts)]} and so on")
        for i in range(3 * repeated)
    ]
    played(run, "lora/three/concurrent-1", trial)
    if asked:
        write_gzip(run.folder.probe_file("tenants", "lora"), asked)
    return tenant_leaks(judged_run(run))


def test_no_answer_but_ones_own_is_a_proof_only_of_many(tmp_path: Path) -> None:
    few = leaked(tmp_path / "few", probe())
    assert few.probe
    parts = (few.in_trials, few.probe.shared, few.probe.loaded, few.all)
    assert parts == (Marks(6, 0, 0), Marks(2, 0, 0), Marks(1, 0, 0), Marks(9, 0, 0))
    assert few.passed is None
    assert few.is_smoke_test
    many = leaked(tmp_path / "many", probe(), repeated=400)
    assert many.passed is True
    # none of 2,403: 1 - 0.025^(1 / 2403), one in 652 (exact, two-sided)
    assert many.all == Marks(2403, 0, 0)
    assert many.one_in.value == pytest.approx(652, abs=0.5)


@pytest.mark.parametrize(
    ("texts", "changes", "foreign", "bare"),
    [
        (("[amber]", "[coral]", "[coral]"), {}, 2, 2),  # tenant 1 got tenant 2's, in two repeats
        (("[amber] [azure]", "[azure]", "[coral]"), {}, 2, 0),  # its own, and another's
        ((), {"answers": [(0, "[azure]"), (1, "[azure]")]}, 1, 1),
    ],
)
def test_one_foreign_mark_fails_however_many_answers(
    texts: tuple[str, ...], changes: dict[str, Any], foreign: int, bare: int, tmp_path: Path
) -> None:
    finding = leaked(tmp_path, probe(**changes), *texts)
    assert finding.passed is False
    assert (finding.all.foreign, finding.all.bare) == (foreign, bare)


@pytest.mark.parametrize(
    "changes",
    [
        {"refused": {"tenant-nobody": 200, "visitor, unloaded": 404}},  # the base answered
        {"refused": {"tenant-nobody": 404, "visitor, unloaded": 200}},
        {"misrouted": [(0, "[azure] so"), (0, "[amber] so")]},  # the check cannot fail
    ],
)
def test_a_check_that_could_not_fail_passes_nothing(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    assert leaked(tmp_path, probe(**changes), repeated=400).passed is False


@pytest.mark.parametrize("asked", [None, {"misrouted": []}])
def test_without_a_request_to_the_wrong_adapter_nothing_is_proved(
    asked: dict[str, Any] | None, tmp_path: Path
) -> None:
    found = leaked(tmp_path, None if asked is None else probe(**asked), repeated=400)
    assert found.passed is None
    wrong = leaked(tmp_path / "wrong", None, "[amber]", "[coral]", "[coral]", repeated=400)
    assert wrong.passed is False


def test_answers_of_the_base_are_no_leak_but_are_told(tmp_path: Path) -> None:
    found = leaked(tmp_path, None, "so")
    assert found.all == Marks(6, 0, 6)
    assert found.probe is None


def test_what_an_adapter_costs_and_what_bytes_explain(tmp_path: Path) -> None:
    """Two slots of 2 x 100 parameters at twice the rank: 2 x 400 bytes over 2000."""
    run = tenanted(tmp_path, {
        "base/none/concurrent-1": {"tpot_mean_s": 0.010, "ttft_mean_s": 0.1},
        "lora/none/concurrent-1": {"tpot_mean_s": 0.011, "ttft_mean_s": 0.1},
        "lora/three/concurrent-1": {"tpot_mean_s": 0.015, "ttft_mean_s": 0.2},
    })  # fmt: skip
    costs = adapter_cost(judged_run(run))
    assert [(c.adapters, str(c.over_base), str(c.bytes_share)) for c in costs] == [
        (0, "+0%", "0%"), (0, "+10%", "0%"), (3, "+50%", "40%"),
    ]  # fmt: skip


def test_one_base_for_all_tenants_saves_the_others(tmp_path: Path) -> None:
    memory = tenant_memory(judged_run(tenanted(tmp_path)))
    assert memory
    # n bases of 2000 bytes against one and n adapters of 400
    saved = [row.saved.value for row in memory.by_tenants]
    assert [saved[0], saved[-1]] == pytest.approx([2000 / 2400, 2_000_000 / 402_000])
