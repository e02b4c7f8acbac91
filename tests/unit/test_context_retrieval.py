"""Retrieval from a long context: what is asked, margins and bytes by hand, what is told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from labs import LABS
from labs.context_retrieval import retrieval
from labs.context_retrieval.facts import Facts, facts
from labs.context_retrieval.lab import (
    admitted,
    arithmetic,
    step_ratio,
)
from labs.context_retrieval.retrieval import (
    Needle,
    adds_up,
    by_text,
    margin,
    margin_change,
    text_lengths,
)
from labs.harness.analysis.computed import Predictions
from labs.harness.analysis.evaluation import DEPTHS, EvaluationClient
from labs.harness.spec.lab import Evidence, Lab, Point
from labs.harness.storage.writing import write_gzip, write_json
from serving.models.catalog import Shape
from tests.unit.builders import CEILINGS, SHAPE
from tests.unit.judged import context, judged_run

LAB = LABS["context-retrieval"]
SMOL = Shape(
    layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, vocab=49152, max_positions=8192,
    params=134_515_008, matmul_params=134_515_008, weight_bytes=269_030_016,
)  # fmt: skip


def point(variant: str, workload: str) -> Point:
    points = LAB.at("cpu", quick=False).points(SMOL, CEILINGS)
    return next(p for p in points if (p.variant.name, p.workload.name) == (variant, workload))


# ---------------------------------------------------------------------------- bytes and admission


def test_what_a_step_attends_to_and_reads_ends_at_the_window() -> None:
    full, window = point("full", "tight"), point("window", "tight")
    assert (full.flags.sliding_window, window.flags.sliding_window) == (None, 192)
    assert full.attended_tokens == full.context_tokens > 192
    assert window.attended_tokens == 192
    per_request = window.kv_bytes() / window.load.users
    assert per_request == 192 * window.shape.kv_bytes_per_token()


def test_bytes_are_those_worked_out_by_hand() -> None:
    """23,040 bytes a token in BF16: 2 x 30 layers x 3 KV heads x 64 x 2."""
    told = arithmetic(LAB.at("cpu", False), point("full", "far"))
    bytes_of = {
        what.removeprefix("KV bytes of a sequence, ").removesuffix(" at 1024"): p.value
        for what, p in told.items()
        if what.startswith("KV bytes")
    }
    full = 1024 * 23_040
    assert bytes_of == pytest.approx({
        "full": full, "fp8": full / 2, "window": 192 * 23_040, "fp8 and window": 96 * 23_040,
        "evicted": full / 5, "shared": full / 2, "fp8 and shared": full / 4,
    })  # fmt: skip


def test_requests_at_once_are_what_the_blocks_hold() -> None:
    """45 blocks, one of them the engine's; a request has 360 tokens, 12 blocks."""
    full, fp8, window = (admitted(point(v, "tight")) for v in ("full", "kv-fp8", "window"))
    assert full == 44 / 12
    assert fp8 == 5
    assert window == 5
    alone = replace(point("window", "tight"), load=LAB.workloads[0].loads[0])
    assert admitted(alone) == 4


def test_a_step_reads_the_weights_and_what_each_variant_keeps() -> None:
    full = point("full", "far")
    context_bytes = 4 * 1032 * 23_040
    whole = 269_030_016 + context_bytes
    fast = CEILINGS.model_copy(update={"bf16_flops_per_s": 1e12})
    windowed = replace(full, variant=point("window", "tight").variant)
    for reads, kept in (
        (point("kv-fp8", "far"), context_bytes / 2), (windowed, 4 * 192 * 23_040),
    ):  # fmt: skip
        treated = replace(reads, ceilings=fast)
        found = step_ratio(treated, replace(full, ceilings=fast)).value
        assert found == pytest.approx((269_030_016 + kept) / whole)


def test_evidence_reads_a_field_within_a_flag() -> None:
    told = {e.arm.variant: e for e in LAB.evidence if e.label == "sliding_window"}
    assert told.keys() == {v.name for v in LAB.variants}
    windowed: Evidence = told["window"]
    assert windowed.expected(point("window", "tight")) == "192"
    turned = LAB.at("cpu", False, {"variants.window.flags.hf-overrides.sliding_window": 64})
    at = next(p for p in turned.points(SHAPE, CEILINGS) if p.variant.name == "window")
    assert windowed.expected(at) == "64"
    assert told["full"].expected(point("full", "far")) == "None"


# ----------------------------------------------------------------------------------------- asking


def position(token: str, **others: float) -> dict[str, Any]:
    """A token of probability 1 - sum of the others', which are named by what they write."""
    known = {token: math.log(1 - sum(others.values()))}
    known |= {name.strip("_"): math.log(p) for name, p in others.items()}
    top = [{"token": t, "logprob": v} for t, v in known.items()]
    return {"token": token, "logprob": known[token], "top_logprobs": top}


TENS, ONES = position("2", _3=0.1), position("7", _1=0.4)


@pytest.mark.parametrize(
    ("positions", "odds"),
    [
        ([position(" "), TENS, ONES, position(".", _5=0.1)], 0.6 / 0.4),  # the least of the digits
        ([position(" indeed", _2=0.3), TENS, ONES], 0.6 / 0.4),
        ([position(" 27", _28=0.2)], 4),
        ([TENS, position("1", _7=0.2), position("9", _7=0.3)], 0.2 / 0.8),  # ends where it is wrong
        ([position("3", _4=0.1, _5=0.05)], 0.05 / 0.85),  # the right digit is out of sight
        ([], None),
        ([position(" none"), position(" of"), position(" these")], None),
    ],
)
def test_the_margin_is_that_of_the_least_certain_digit(
    positions: list[dict[str, Any]], odds: float | None
) -> None:
    found = margin("27", positions)
    assert found == (odds and pytest.approx(math.log(odds)))


class Client(EvaluationClient):
    """An engine that knows every number but the one at the beginning."""

    bodies: list[dict[str, Any]]

    def complete(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        assert path == "chat/completions"
        self.bodies.append(dict(body))
        text, lead = (m["content"] for m in body["messages"])
        needle = text[text.index(lead) :].removeprefix(lead)[1:5]
        written = "0000" if text.index(lead) == 0 else needle
        positions = [position(written, x=0.1)]
        return {"message": {"content": f" {written}."}, "logprobs": {"content": positions}}


def test_each_needle_is_asked_for_with_its_place_and_its_distance() -> None:
    client = Client("http://nowhere", "m")
    object.__setattr__(client, "bodies", [])
    needles = retrieval.ask(client, [256, 512], 2, lambda text: len(text.split()))
    assert [(n.text, n.length_tokens, n.depth) for n in needles] == [
        (text, length, depth) for text in (0, 1) for length in (256, 512) for depth in DEPTHS
    ]
    assert [n.correct for n in needles] == 4 * [False, True, True, True, True]
    assert all((n.margin_nats or 0) > 0 for n in needles if n.correct)
    assert all((n.margin_nats or 0) < 0 for n in needles if not n.correct)
    for group in (needles[:5], needles[5:10]):
        distances = [n.distance_tokens for n in group]
        assert distances == sorted(distances, reverse=True)
        assert distances[-1] < 40  # the last sentence, the question and the answer's beginning
        assert 0.5 * group[0].length_tokens < distances[0] < group[0].length_tokens
    body = client.bodies[0]
    assert (body["logprobs"], body["top_logprobs"], body["continue_final_message"]) == (
        True, 20, True,
    )  # fmt: skip


def test_the_two_longest_texts_that_fit_are_asked() -> None:
    assert [text_lengths(n) for n in (2560, 1280, 20480, 400, 100)] == [
        [1024, 2048], [512, 1024], [8192, 16384], [128, 256], [],
    ]  # fmt: skip


# --------------------------------------------------------------------------------------- judging


def needles(
    right: Sequence[bool], margins: Sequence[float], distances: Sequence[int] = ()
) -> list[Needle]:
    """Texts of five needles each."""
    return [
        Needle(
            text=i // 5, length_tokens=512, depth=DEPTHS[i % 5],
            distance_tokens=distances[i % 5] if distances else 250 - 50 * (i % 5),
            expected=str(1000 + i), answer="", correct=correct, margin_nats=m,
        )
        for i, (correct, m) in enumerate(zip(right, margins, strict=True))
    ]  # fmt: skip


def test_a_change_of_the_margin_has_an_interval_over_texts() -> None:
    before = needles([True] * 15, [4.0] * 15)
    after = needles([True] * 15, [3.0] * 5 + [2.0] * 5 + [1.0] * 5)
    change = margin_change(before, after)
    assert change
    assert change.value == -2
    assert change.n == 3
    # a standard deviation of 1 over three texts: t(2) / sqrt(3)
    assert (change.low, change.high) == pytest.approx((-2 - 2.484, -2 + 2.484), abs=0.001)
    assert margin_change(before[:5], after[:5]) == change.model_copy(
        update={"value": -1.0, "low": None, "high": None, "n": 1}
    )


def test_two_losses_add_up_or_do_not() -> None:
    short, long, another = (512, 0), (1024, 0), (2048, 0)
    one = {short: [-1.0, -1.0], long: [-2.0]}
    other = {short: [-0.5], long: [-1.0], another: [-9.0]}
    both = {short: [-1.5, -1.5], long: [-3.0]}
    found = adds_up(both, [one, other])
    assert found
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1))
    assert adds_up(both, [{short: [1.0]}, {short: [1.0]}]) is None  # no loss to divide by


def test_other_needles_are_not_compared() -> None:
    before = needles([True] * 5, [1.0] * 5)
    with pytest.raises(ValueError, match="not asked for the same needles"):
        by_text(before, before[:4])


# ----------------------------------------------------------------------------------- what is told

WITHOUT_WEIGHTS: dict[str, Any] = {"variants": ["full", "kv-fp8", "window"]}


def of_lab() -> Lab:
    return LAB.at("cpu", quick=True, changes={**WITHOUT_WEIGHTS, "requests": 16})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """Three texts: FP8 loses the needle of the least margin, a window all beyond 192 tokens."""
    far, tight = "far/concurrent-4", "tight/concurrent-5"
    run = context(tmp_path_factory.mktemp("retrieval"), of_lab(), {
        f"full/{far}": {"tpot_mean_s": 0.1}, f"kv-fp8/{far}": {"tpot_mean_s": 0.08},
        f"full/{tight}": {"batch": 3.0}, f"window/{tight}": {"batch": 6.0},
    })  # fmt: skip
    margins = [3.0, 2.0, 0.5, 2.0, 3.0] * 3
    answers = {
        "full": needles([True] * 15, margins),
        "kv-fp8": needles([True, True, False, True, True] * 3, [m - 1 for m in margins]),
        "window": needles([False, False, True, True, True] * 3, [-2.0, -2.0, 0.5, 2.0, 3.0] * 3),
    }
    for variant, asked_for in answers.items():
        plain = {"needles": [n.model_dump(mode="json") for n in asked_for], "took_s": 1.0}
        write_gzip(run.folder.probe_file("retrieval", variant), plain)
    told = arithmetic(run.lab, next(p for p in run.points if p.variant.name == "full"))
    predictions = Predictions(effects={}, forecasts={}, arithmetic=told)
    write_json(run.folder.path / "predictions.json", predictions)
    return facts(judged_run(run))


def test_what_is_found_stands_by_length_and_depth(found: Facts) -> None:
    full, fp8, window = found.retrieval
    assert [(of.correct, of.asked) for of in (full, fp8, window)] == [(15, 15), (12, 15), (9, 15)]
    assert [(at.depth, at.distance_tokens) for at in full.places] == [
        (0, 250), (0.25, 200), (0.5, 150), (0.75, 100), (1, 50),
    ]  # fmt: skip
    assert [(at.correct, at.margin_nats.value) for at in fp8.places] == [
        (3, 2), (3, 1), (0, -0.5), (3, 1), (3, 2),
    ]  # fmt: skip
    assert [(at.correct, at.is_reached) for at in window.places] == [
        (0, False), (0, False), (3, True), (3, True), (3, True),
    ]  # fmt: skip


def test_what_is_lost_is_what_had_the_least_margin(found: Facts) -> None:
    assert found.retrieval_lost
    fp8, window = found.retrieval_lost.variants
    assert (fp8.found.correct, fp8.lost, fp8.gained) == (12, 3, 0)
    assert (fp8.margin_of_lost.value, fp8.margin_of_kept.value) == (0.5, 2.5)
    assert (fp8.margin.value, fp8.margin.low) == pytest.approx((-1, -1))
    assert fp8.difference.value == pytest.approx(-0.2)
    assert fp8.difference.low is not None
    assert fp8.difference.low < -0.2
    assert fp8.p_value == 0.25
    assert (fp8.is_shown, window.is_shown) == (False, True)
    assert window.within
    assert window.beyond
    assert (window.within.correct, window.within.asked) == (9, 9)
    assert (window.beyond.correct, window.beyond.asked) == (0, 6)
    assert not window.loses_within
    near, far = window.held
    assert (near.measured.value, near.outcome) == (1, "open")  # of nine
    assert (far.measured.value, far.outcome) == (0, "open")  # of six


def test_the_four_ways_stand_side_by_side(found: Facts) -> None:
    assert found.kv_methods
    ways = found.kv_methods.ways
    assert ways["full"].sequence.value == pytest.approx(0.03125)  # MiB, of the small shape
    assert {name: of.ratio for name, of in ways.items()} == pytest.approx({
        "full": 1, "fp8": 0.5, "window": 192 / 1024, "fp8 and window": 96 / 1024,
        "evicted": 0.2, "shared": 0.5, "fp8 and shared": 0.25,
    })  # fmt: skip
    window = ways["window"]
    assert window.at_once.value == pytest.approx(2)
    assert window.found
    assert (window.found.correct, window.found.asked) == (9, 15)
    assert not ways["shared"].is_measured
