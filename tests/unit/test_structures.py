"""Structures: what is asked for, what is sent, what proves it, and what is concluded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from labs import LABS
from labs.harness.analysis.checks.expected import Expected
from labs.harness.analysis.quantity import Quantity
from labs.harness.analysis.validity import faults_of_set_up
from labs.harness.spec.lab import LabError, Point
from labs.structured_output.facts import (
    AnswerCounts,
    FirstToken,
    FirstTokens,
    How,
    Overhead,
    Step,
    Validity,
    is_valid,
)
from labs.structured_output.facts import masks as masks_of
from labs.structured_output.lab import first_token_ratio, masking, step_ratio
from loadtests.plan import body
from loadtests.prompts import Writer
from loadtests.structures import (
    FORMS,
    LEAST_TOKENS,
    Form,
    Structure,
    begins_so,
    example,
    instruction,
    spec,
)
from loadtests.workload import Asked, Fixed
from serving.models import grammar_masks
from serving.simulator.step import mask_threads
from tests.unit.builders import CEILINGS, SHAPE, make_record, make_trial, make_workload, words
from tests.unit.judged import context


@pytest.mark.parametrize("mark", ["", "7x3"])
@pytest.mark.parametrize("form", FORMS)
def test_an_example_is_valid_and_what_is_cut_off_begins_alike(form: Form, mark: str) -> None:
    asked, answer = spec(form, mark), example(form, mark)
    assert is_valid(answer, asked)
    assert all(begins_so(answer[:n], asked) for n in range(1, len(answer)))
    assert begins_so(answer.replace(":", ": "), asked)
    assert not begins_so(f"Here it is: {answer}", asked)
    assert not begins_so("", asked)
    assert not begins_so(answer, spec(form, "1x2"))
    for odd in (answer[:-1], f"{answer} ", f"```{answer}```"):
        assert is_valid(odd, asked) == ("json" in asked and odd == f"{answer} ")  # space is JSON's
    if "json" in asked:
        jsonschema.Draft202012Validator.check_schema(asked["json"])
        assert not is_valid(json.dumps({**json.loads(answer), "more": 1}), asked)
    assert not is_valid("[" * 100_000, asked)


def structured(**fields: Any) -> Any:
    own: dict[str, Any] = {"structure": Structure(form="record"), "keep_text": True,
                           "prompt_tokens": Fixed(tokens=60)}  # fmt: skip
    return make_workload(**{**own, **fields})


def test_what_is_imposed_is_sent_with_the_request_and_what_is_asked_for_is_not() -> None:
    (imposed,) = structured().requests(1, 0, Writer(words))
    asked_only = structured(structure=Structure(form="record", imposed=False))
    (asked,) = asked_only.requests(1, 0, Writer(words))
    assert imposed.messages == asked.messages
    assert instruction(spec("record")) in imposed.messages[-1]["content"]
    sent = body(imposed, "m")
    assert sent.pop("structured_outputs") == spec("record")
    assert sent == body(asked, "m")


def test_an_unseen_structure_is_asked_for_once() -> None:
    workload = structured(structure=Structure(form="record", unseen=True))
    marks = [json.dumps(own.structure) for seed in (1, 2, 1001) for own in workload.asked(40, seed)]
    assert len(set(marks)) == len(marks)
    seen = structured().asked(40, 1)
    assert all(own.structure == spec("record") for own in seen)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_text": False}, "nothing proves"),
        ({"output_tokens": Fixed(tokens=LEAST_TOKENS)}, "structured answer"),
        ({"task": "story"}, "task.*structure|structure.*task"),
    ],
)
def test_what_cannot_be_proved_or_may_end_by_itself_is_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        structured(**fields)


def test_an_answer_that_begins_otherwise_proves_that_nothing_was_imposed() -> None:
    workload = structured()
    point = replace(make_trial([]).point, workload=workload)
    asked = [Asked(4, 2, None, spec("record"))] * 6

    def faults(*texts: str | None) -> list[str]:
        found = [
            make_record([(t + 0.1, 1), (t + 0.2, 1)], sent_s=t, index=i, text=text)
            for i, (t, text) in enumerate(zip(range(10, 16), texts, strict=True))
        ]
        trial = replace(make_trial(found), point=point, asked=asked)
        return [c.text for c in faults_of_set_up(trial, Expected()) if "treatment" in c.name]

    good = '{"name'
    assert faults(*[good] * 6) == []
    (odd,) = faults(*[good] * 5, "Sure! ")
    assert "1 of 6 answers" in odd
    assert faults(*[good] * 5, None)


# ------------------------------------------------------------------------------- predictions

FORMS_TIMED = {form: {"compile_s": 0.4, "again_s": 0.1, "mask_s": 0.01} for form in FORMS}
STUDY = {
    "processors": 8,
    "backends": {
        "xgrammar": {"error": None, "forms": FORMS_TIMED},
        "guidance": {"error": "ImportError: no", "forms": {}},
    },
}


def point_of(variant: str, workload: str) -> Point:
    points = LABS["structured-output"].points(SHAPE, CEILINGS, about={"masks": STUDY})
    return next(p for p in points if (p.variant.name, p.workload.name) == (variant, workload))


def test_masks_cost_what_they_take_beyond_the_step_they_hide_behind() -> None:
    imposed, asked = (point_of("xgrammar", name) for name in ("imposed", "asked"))
    assert masking(asked) is None
    step_s = (2000 + 8 * imposed.context_tokens * 2 * 2 * 4 * 2) / 1e6  # bytes / bandwidth
    slow = max(step_s, 8 * 0.01)
    assert step_ratio(imposed, asked).value == pytest.approx(slow / step_s)
    unseen, seen = (point_of("xgrammar", name) for name in ("unseen", "seen"))
    ratio = first_token_ratio(unseen, seen).value
    assert 1 < ratio < 4  # 0.4 s / 0.1 s, and a prefill beside both


def test_a_backend_that_cannot_serve_is_refused_before_anything_starts() -> None:
    with pytest.raises(LabError, match=r"guidance .* \(ImportError: no\)"):
        masking(point_of("guidance", "imposed"))
    with pytest.raises(LabError, match=r"'outlines' .* xgrammar, guidance"):
        masking(point_of("outlines", "imposed"))


@pytest.mark.parametrize(
    ("sequences", "processors", "threads"), [(128, 64, 1), (129, 64, 8), (129, 6, 3), (129, 1, 1)]
)
def test_masks_of_a_large_batch_are_shared_out(
    sequences: int, processors: int, threads: int
) -> None:
    assert mask_threads(sequences, processors) == threads


# -------------------------------------------------------------------------------- the study


class Backend:
    """A backend that takes any structure; its grammar refuses the token 13."""

    def __init__(self, config: Any, **_: Any) -> None:
        assert config

    def compile_grammar(self, *_: Any) -> Backend:
        return self

    def allocate_token_bitmask(self, rows: int) -> list[int]:
        return [0] * rows

    def fill_bitmask(self, mask: list[int], row: int) -> None:
        mask[row] = 1

    def accept_tokens(self, request: str, tokens: list[int]) -> bool:
        return tokens != [13]


class Tokenizer:
    def encode(self, text: str, **_: Any) -> list[int]:
        return [len(word) for word in text.split()]

    def decode(self, tokens: list[int]) -> str:
        return "x" * tokens[0]


def test_a_backend_that_fails_says_why_and_the_others_have_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grammar_masks, "_backend", lambda _: Backend)
    monkeypatch.setattr(grammar_masks, "_compiled", lambda backend, _: (0.5, backend))
    model = SimpleNamespace(get_vocab_size=lambda: 4)
    config = SimpleNamespace(model_config=model)

    def timed(answer: str) -> dict[str, Any]:
        asked = {"record": [{"structure": {"regex": "a"}, "answer": answer}] * 2}
        return grammar_masks.timed("mine", config, Tokenizer(), asked)

    good = timed("four tokens of it")
    assert good["error"] is None
    assert good["forms"]["record"]["compile_s"] == 0.5
    assert 0 < good["forms"]["record"]["mask_s"] < 0.1
    assert "refuses a token" in timed("incorruptible")["error"]
    model.get_vocab_size = lambda: 1 / 0
    assert timed("a")["error"].startswith("ZeroDivisionError")


def test_the_reason_of_a_backend_is_the_first_error_and_not_what_was_made_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As lm-format-enforcer does with a module that vLLM has no more."""

    def unusable(_: str) -> Any:
        try:
            import json.gone  # type: ignore[import-not-found] # noqa: F401
        except ImportError:
            raise ImportError("vllm is not installed")  # noqa: B904

    monkeypatch.setattr(grammar_masks, "_backend", unusable)
    error = grammar_masks.timed("mine", None, None, {})["error"]
    assert "json.gone" in error


# ------------------------------------------------------------------------------- the findings


def answers(how: How, asked: int, valid: int, cut_off: int = 0) -> AnswerCounts:
    return AnswerCounts("record", how, "xgrammar", asked, valid, cut_off, Quantity(30.0))


def seconds(value: float | None) -> Quantity:
    return Quantity(value, "s")


def test_one_whole_answer_that_breaks_its_structure_fails_however_many_keep_to_it() -> None:
    kept = Validity((answers("asked", 9, 2), answers("imposed", 9, 8, cut_off=1)))
    assert kept.passed is True
    assert Validity((*kept.groups, answers("imposed", 9, 8))).passed is False
    assert Validity((answers("imposed", 9, 0, cut_off=9),)).passed is None
    assert Validity((answers("free", 9, 0),)).passed is None
    asked, imposed = kept.kept
    assert [(of.how, of.valid, of.asked) for of in (asked, imposed)] == [
        ("asked", 2, 9), ("imposed", 8, 9),
    ]  # fmt: skip
    assert imposed.at_least.value == pytest.approx(0.52, abs=0.005)  # Clopper-Pearson


def test_answers_that_only_control_characters_break_are_told_apart() -> None:
    asked, answer = spec("record"), example("record")
    tab = answer.replace("bridge", "bri\tge")
    assert not is_valid(tab, asked)
    assert is_valid(tab, asked, strict=False)
    for other in (answer[:-1], tab.replace("1904", "4")):
        assert not is_valid(other, asked, strict=False)
    assert not is_valid("order\t", spec("regex"), strict=False)
    broken = replace(answers("imposed", 9, 6), control_characters=2)
    found = Validity((broken, answers("imposed", 9, 9), answers("free", 9, 0)))
    assert found.passed is False
    assert found.with_control_characters == [broken]


def test_the_slowest_masks_fit_the_step_or_do_not() -> None:
    fits = Step("a", "imposed", 8, seconds(0.06), without_s=seconds(0.05), masks_s=seconds(0.004))
    assert fits.longer.value == pytest.approx(0.2)
    assert fits.hides_masks is True
    # its own step has them, and is longer for it
    assert replace(fits, masks_s=seconds(0.055)).hides_masks is False
    slow = replace(fits, backend="b", masks_s=seconds(0.09))
    lacking = replace(slow, without_s=seconds(None), masks_s=seconds(0.2))
    assert Overhead((fits, slow, lacking)).slowest == slow
    assert Overhead((fits, slow, lacking)).lacks_some
    assert not replace(fits, tpot_s=seconds(None)).longer.known


def test_the_longest_wait_is_named() -> None:
    quick = FirstToken("a", "record", 3, seconds(0.2), seen_s=seconds(0.21), compile_s=seconds(0.1))
    slow = FirstToken("b", "nested", 3, seconds(0.9), seen_s=seconds(0.2), compile_s=seconds(None))
    assert slow.later_s.value == pytest.approx(0.7)
    found = FirstTokens((quick, slow))
    assert (found.longest, found.shortest, found.timed) == (slow, quick, 3)
    assert FirstTokens(()).longest is None


def test_a_backend_without_figures_has_its_reason(tmp_path: Path) -> None:
    values = {"xgrammar/asked-alone/concurrent-1": {"tpot_mean_s": 0.05}}
    lab = LABS["structured-output"].at("cpu", quick=False)
    found = masks_of(context(tmp_path, lab, values, about={"masks": STUDY}))
    assert {of.form: of.most_hidden for of in found.forms} == dict.fromkeys(FORMS, 5)
    assert found.unusable == {"guidance": "ImportError: no"}
