"""What can be copied in a model's own answers, and forecasts that hang on chance."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labs import LABS
from labs.harness.analysis.computed import Band, PointForecasts, Predictions
from labs.harness.forecast.copied_text import lookup_of, share_copied
from labs.harness.forecast.simulated_trials import _bands, by_chance, paces
from labs.harness.runner.run import predict
from labs.harness.spec.lab import Prediction
from labs.harness.spec.names import PairName
from labs.harness.storage.recorded import Run
from serving.models import making
from serving.models.ngram_lookup import looked_up
from serving.simulator.ngram_acceptance import (
    Copying,
    CopyingPlan,
    Lookup,
    copied_in,
    copying,
    decoded,
)
from tests.unit.builders import CEILINGS, PREDICTION, SHAPE, make_claim, make_point

ONE_WORD = Lookup(guesses=3, least=1, most=1)


def test_lookup_goes_on_where_the_longest_ngram_came_first() -> None:
    text = [1, 2, 3, 9, 7, 2, 3, 8, 1, 2, 3]
    assert list(looked_up(text, 3, 2, 4)) == [9, 7, 2]  # 1 2 3, not the later 2 3
    assert not looked_up([1, 2, 3, 4], 3, 2, 4)
    assert not looked_up([5], 3, 2, 4)
    assert list(looked_up([5, 6, 5], 3, 1, 1)) == [6, 5]


def test_every_place_of_an_answer_knows_its_guesses_and_how_many_are_right() -> None:
    copied = copied_in([1, 2, 3, 4], [1, 2, 3, 9, 8, 2], 4, ONE_WORD)
    assert copied == ((3, 2), (3, 1), (3, 0), (0, 0))  # 2 3 4, then 3 4 1, then 4 1 2, then none
    assert decoded(copied) == (3, 2)  # two are right, and the fourth token is the model's own
    assert decoded(((0, 0), (3, 0), (3, 3), (0, 0))) == (6, 3)


def test_the_model_answers_the_first_requests_of_each_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the model repeats its prompt, and goes on beyond the answer's last token."""
    asked: list[int] = []

    def answer(model: object, prompts: list[list[int]], tokens: int, **_: object) -> object:
        asked.append(tokens)

        class Tokens:
            def tolist(self) -> list[list[int]]:
                return [(prompt * tokens)[:tokens] for prompt in prompts]

        return Tokens()

    monkeypatch.setattr(making, "load", lambda folder: (None, None))
    monkeypatch.setattr(making, "tokens_of", lambda _, messages: messages)
    monkeypatch.setattr(making, "answer", answer)
    files = []
    for repeat in range(2):
        lines = [
            {"output_tokens": 4, "intruder": n == 0, "body": json.dumps({"messages": [7, 8, 9, n]})}
            for n in range(4)
        ]
        files.append(tmp_path / str(repeat))
        files[-1].write_text("\n".join(map(json.dumps, lines)))
    plan = CopyingPlan(model=tmp_path, requests=tuple(files), answers=2, lookup=ONE_WORD)
    found = copying(plan)
    assert [len(repeat) for repeat in found.answers] == [2, 2]
    assert found.answers[0][0] == ((3, 3),) * 4  # also beyond its end
    assert asked == [4 + 3]

    with monkeypatch.context() as patched:
        patched.setattr(
            "serving.simulator.ngram_acceptance.MOST_S", 0.0
        )  # such as of a large model
        assert copying(plan) == Copying(answers=())

    def too_large(folder: Path) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(making, "load", too_large)
    assert copying(plan) == Copying(answers=())


def test_lookups_are_those_of_the_engine() -> None:
    config = {"method": "ngram", "num_speculative_tokens": 2}

    def lookup(**more: object) -> Lookup | None:
        return lookup_of({"speculative-config": {**config, **more}})

    assert lookup() == Lookup(guesses=2, least=5, most=5)
    assert lookup(prompt_lookup_max=4) == Lookup(guesses=2, least=4, most=4)
    assert lookup(prompt_lookup_max=4, prompt_lookup_min=2) == Lookup(guesses=2, least=2, most=4)
    assert lookup(method="draft_model") is None
    assert lookup_of({}) is None
    copying_labs = {
        lab.name for lab in LABS.values() for v in lab.variants if lookup_of(lab.flags_of(v))
    }
    assert copying_labs >= {"speculative-decoding", "diagnosis"}


def test_a_share_that_hangs_on_few_answers_has_a_wide_band() -> None:
    right, wrong, nothing = ((3, 3), (0, 0)), ((3, 0), (0, 0)), ((0, 0), (0, 0))
    known = [[right, right, wrong, nothing]]
    few = share_copied(known, 5, random.Random(0))
    many = share_copied(known, 500, random.Random(0))
    assert few
    assert many
    assert few.value == many.value == pytest.approx(2 / 3)
    assert few.low == 0.0
    assert 0.5 < many.low < many.value < many.high < 0.8
    apart = share_copied([[right], [wrong]], 500, random.Random(0))  # as a shared prefix has it
    assert apart
    assert (apart.low, apart.high) == (0.0, 1.0)
    assert share_copied([[nothing]], 5, random.Random(0)) is None


def test_no_two_plays_of_a_contended_load_have_the_same_speed() -> None:
    speeds = paces(9, 1.2)
    assert speeds[0] == 1.0  # as timed: the ends of the band are shifts of this play
    assert len(set(speeds)) == 9
    assert 1 / 1.2 < min(speeds) < 0.9
    assert 1.1 < max(speeds) < 1.2
    assert paces(4, 1.2).count(1.0) == 2
    assert paces(3, 1.0) == [1.0] * 3


def test_a_band_holds_what_hangs_on_chance() -> None:
    """First tokens that wait or do not, by which of two prompts comes first."""
    waits = [{"ttft_mean_s": s} for s in (0.2, 0.2, 1.4, 0.2, 1.4)]
    names = ("ttft_mean_s",)
    band = _bands(waits, [waits[0], waits[0]], 5, names)["ttft_mean_s"]
    assert band.value == pytest.approx(0.68)
    assert 0.2 <= band.low < 0.5
    assert 1.0 < band.high <= 1.4
    assert band.geometric_mean == pytest.approx((0.2**3 * 1.4**2) ** 0.2)
    ends = [{"ttft_mean_s": s} for s in (0.18, 0.236)]
    steady = _bands([{"ttft_mean_s": 0.2}] * 5, ends, 5, names)
    assert (steady["ttft_mean_s"].low, steady["ttft_mean_s"].high) == pytest.approx((0.18, 0.236))
    assert by_chance([0.3], 1) == 0.0


def test_a_forecast_ratio_is_one_of_geometric_means_as_the_measured_one_is() -> None:
    treatment, baseline = make_point("a"), make_point("b")

    def forecasts(**of_treatment: float) -> PointForecasts:
        bands = (
            Band(value=2, low=1, high=3, **of_treatment),
            Band(value=2, low=1, high=3, geometric_mean=2),
        )
        points = (treatment.key, baseline.key)
        return PointForecasts(
            points={key: {"ttft_mean_s": b} for key, b in zip(points, bands, strict=True)}
        )

    def ratio(found: PointForecasts) -> float:
        prediction = found.ratio("ttft_mean_s", PairName(treatment.key, baseline.key))
        assert prediction
        return prediction.value

    assert ratio(forecasts(geometric_mean=1)) == 0.5
    assert ratio(forecasts()) == 1.0  # a play had 0: the arithmetic means, on both sides
    both = forecasts(geometric_mean=1)
    of_means = both.ratio("ttft_mean_s", PairName(treatment.key, baseline.key), of_means=True)
    assert of_means
    assert of_means.value == 1.0
    claim, pair = make_claim(metric="ttft_mean_s"), f"{treatment.key}|{baseline.key}"

    def held_against(written: Prediction) -> Prediction | None:
        before = Predictions(
            effects={claim.name: {pair: written}}, forecasts={}, in_virtual_time=both
        )
        return before.of_means(claim, treatment.key, baseline.key)

    assert held_against(of_means) == of_means
    assert held_against(PREDICTION) is None  # a closed form, which names no mean


def test_evidence_follows_the_answers_that_were_read_and_no_assumed_chance() -> None:
    lab = LABS["diagnosis"].at("cpu", quick=False)
    points = lab.points(SHAPE, CEILINGS)
    (guessing,) = (p.key for p in points if p.flags.speculative_config)
    setup: Any = SimpleNamespace(lab=lab, points=points)
    assert predict(setup, None).acceptance.keys() == {guessing}
    copied = {guessing: Band(value=0.5, low=0.1, high=0.9)}
    found = {"prefix_hit_rate": Band(value=0.5, low=0.4, high=0.6)}
    forecasts = PointForecasts(
        points={guessing: found}, copied=copied, least_found={guessing: (0, 16)}
    )
    predictions = predict(setup, forecasts)
    assert predictions.acceptance == {}
    run = Run.model_construct(endpoint="http://127.0.0.1:1")
    assert run.expected(predictions).least_copied == {guessing: 0.1}
    assert run.expected(predictions).least_hit_rate == {guessing: 0.4}
    assert run.expected(predictions).least_found == {guessing: (0, 16)}
