"""The roofline of a lesson: what theory computes, and dots where the report has measured them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from labs.harness import theory
from labs.harness.filing import results
from labs.harness.filing.results import RunFolder, write_json
from labs.harness.judging.judge import Caveat
from labs.harness.telling import roofline
from labs.harness.telling.dials import cards, shipped_shape
from labs.harness.telling.summary import summarise
from serving.weights import dummy, models
from tests.unit.builders import plain_manifest, write_run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    return write_run(tmp_path)


@pytest.fixture(scope="module")
def drawn() -> dict[str, Any]:
    return roofline.data([plain_manifest()])


def test_every_place_under_a_roof_is_what_theory_computes(drawn: dict[str, Any]) -> None:
    names = [machine["name"] for machine in drawn["machines"]]
    assert names == [plain_manifest().machine.describe(), *(card.name for card in cards())]
    assert drawn["models"][0] == plain_manifest().model
    model = drawn["models"].index("Llama 3.1 8B")
    shape, card = shipped_shape("llama-8b"), cards()[0]
    (work,) = (w for w in drawn["works"]
               if (w["model"], w["bits"], w["context"]) == (model, 16, 1024))  # fmt: skip
    for place, batch in enumerate(drawn["batches"]):
        flops, moved = (f(shape, batch, 1024) for f in (theory.decode_flops, theory.decode_bytes))
        step_s = theory.decode_step_s(shape, card.ceilings, batch, 1024)
        assert work["intensity"][place] == pytest.approx(flops / moved, rel=1e-3)
        assert work["step_s"][names.index(card.name)][place] == pytest.approx(step_s, rel=1e-3)
        reached = roofline.attainable_flops_per_s(card.ceilings, flops / moved)
        assert flops / step_s == pytest.approx(reached)  # it stands on the roof
    assert len(json.dumps(drawn)) < 60_000


def test_fewer_bits_are_read_faster_and_fp8_has_a_rate_of_its_own(drawn: dict[str, Any]) -> None:
    model, names = (drawn["models"].index("Llama 3.1 8B"), [m["name"] for m in drawn["machines"]])
    steps = {w["bits"]: w["step_s"][names.index("H100 80GB HBM3")][0] for w in drawn["works"]
             if (w["model"], w["context"]) == (model, 128)}  # fmt: skip
    assert steps[4] < steps[8] < steps[16]
    quantized = models.shape_of(dummy.quantized(dummy.config_of("llama-8b"), "fp8"))
    assert steps[8] == pytest.approx(
        theory.decode_step_s(quantized, cards()[0].ceilings, 1, 128), rel=1e-3
    )
    roofs = drawn["machines"][names.index("H100 80GB HBM3")]["roofs"]
    assert max(roofs[8]["y"]) > max(roofs[16]["y"]) == max(roofs[4]["y"])


def test_experts_are_drawn_in_16_bits_alone(drawn: dict[str, Any]) -> None:
    model = drawn["models"].index("Qwen3 30B-A3B")
    assert {w["bits"] for w in drawn["works"] if w["model"] == model} == {16}


def test_a_dot_is_what_the_report_has_measured(folder: RunFolder) -> None:
    run, summary = folder.run(), summarise(folder)
    calm = summary.model_copy(update={"caveats": []})
    found = roofline.dots([(run, calm)])
    assert [d.flops_per_s for d in found] == [
        calm.value(p.key, "flops_per_s") for p in run.points()
    ]
    for dot in found:
        at_most = run.ceilings.memory_bandwidth_bytes_per_s * dot.intensity
        assert dot.share == dot.flops_per_s / min(at_most, run.ceilings.bf16_flops_per_s)
    told = roofline.lesson_data(found)
    assert (told["machine"], told["model"]) == (run.machine.describe(), run.model)
    assert told["batch"] in roofline.BATCHES
    assert len(roofline.dots_table(found).rows) == len(told["dots"]) == len(run.points())


def test_a_point_that_is_not_valid_is_no_dot(folder: RunFolder) -> None:
    first = folder.run().points()[0].key
    caveat = Caveat(name="x", text="x", blocks=True, point=first)
    summary = summarise(folder).model_copy(update={"caveats": [caveat]})
    write_json(folder.path / "summary.json", summary)
    left = roofline.dots([(folder.run(), folder.summary())])
    assert len(left) == len(folder.run().points()) - 1
    assert roofline.lesson_data([])["dots"] == []
