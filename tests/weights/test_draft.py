"""Refusals, and a draft distilled from a tiny random Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from labs import LABS
from labs.speculative_decoding.lab import accepted, copies_accepted, guessed, tpot_ratio
from serving.engines.vllm_flags import VllmFlags
from serving.models import draft
from serving.models.draft import TargetAnswer, lookup, make
from serving.models.making import MakerError
from tests.unit.builders import CEILINGS, SHAPE, write_tiny_llama
from tests.weights import made


def write_prompts(path: Path, count: int) -> Path:
    lines = [
        {"kind": "even" if i % 2 else "odd", "messages": [{"role": "user", "content": f"{i} " * 3}]}
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny", layers=4, initializer_range=0.3)


def test_distilling_makes_a_smaller_model_that_agrees_with_the_target(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(draft, "LEARNING_RATE", 1e-2)
    monkeypatch.setattr(draft, "LAYERS", 2)
    prompts = write_prompts(tmp_path / "p", 48)

    def after(epochs: int) -> dict[str, Any]:
        monkeypatch.setattr(draft, "EPOCHS", epochs)
        return made(make, tiny, tmp_path / f"{epochs}", source=prompts)

    untrained, trained = after(0), after(8)
    assert untrained["steps"] == 0
    assert trained["steps"] == 8 * 4
    assert trained["trained_on_tokens"] == 32 * draft.ANSWER_TOKENS
    # half as often again; by how much more depends on the type that this machine computes in
    assert trained["acceptance"] > 1.4 * untrained["acceptance"]
    assert trained["acceptance_untrained"] == untrained["acceptance_untrained"]
    assert trained["acceptance_within"][64].keys() == {"even", "odd", "all"}

    target = AutoModelForCausalLM.from_pretrained(tiny)
    cut, taught = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("0", "8"))
    assert taught.config.num_hidden_layers == 2
    assert taught.dtype == torch.bfloat16
    assert trained["params"] == taught.num_parameters()
    for ours, first in ((0, 0), (1, 3)):  # the first layer and the last
        torch.testing.assert_close(
            cut.model.layers[ours].mlp.up_proj.weight,
            target.model.layers[first].mlp.up_proj.weight.bfloat16(),
        )
    assert torch.equal(taught.lm_head.weight, cut.lm_head.weight)


def test_a_target_of_few_layers_has_no_draft(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 3}')
    with pytest.raises(MakerError, match="has 3 layers"):
        make(tmp_path, tmp_path, tmp_path)


def test_a_copied_text_is_looked_up_and_another_is_not() -> None:
    copied = TargetAnswer("quote", prompt=[*range(20)], tokens=[*range(20)], states=None)
    fresh = TargetAnswer("story", prompt=[*range(20)], tokens=[*range(100, 120)], states=None)
    assert lookup([copied, fresh]) == {
        "quote": {"found": pytest.approx(5 / 6), "accepted": 1.0},  # not after the first token
        "story": {"found": 0.0, "accepted": None},
    }
    strays = TargetAnswer("quote", prompt=[*range(20)], tokens=[0, 1, 2, 3, 50, 51], states=None)
    # after 0 nothing; after 0 1 guesses 2 3 4, two of which are right; after 50 nothing
    assert lookup([strays]) == {"quote": {"found": 1 / 3, "accepted": pytest.approx(2 / 3)}}
    assert lookup([strays], first=4) == {"quote": {"found": 1 / 2, "accepted": 1.0}}


def test_lookup_is_measured_as_the_lab_has_it_guess() -> None:
    (variant,) = (v for v in LABS["speculative-decoding"].variants if v.name == "ngram")
    config = VllmFlags(variant.flags).speculative_config
    measured = (draft.LOOKUP_GUESSES, draft.LOOKUP_LEAST, draft.LOOKUP_MOST)
    names = ("num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max")
    assert measured == tuple(config[name] for name in names)


def test_a_forecast_takes_the_share_that_is_accepted_of_its_kind_of_text() -> None:
    made = {
        "acceptance": 0.6,
        "acceptance_within": {"8": {"story": 0.7}, "16": {"story": 0.5}, "64": {"story": 0.4}},
        "lookup_within": {"16": {"quote": {"found": 0.8, "accepted": 0.95}}},
    }
    lab = LABS["speculative-decoding"].at("cpu", quick=False)
    points = lab.points(SHAPE, CEILINGS, about={"draft": made, "eagle": made})
    shares = {
        (p.variant.name, p.workload.name): accepted(p) for p in points if p.flags.speculative_config
    }
    assert shares["draft-2", "story"] == 0.5
    assert shares["draft-2", "quote"] == 0.6
    assert shares["ngram", "quote"] == 0.95
    assert shares["ngram", "story"] == 0.2
    assert shares["ngram", "edit"] == shares["ngram", "code"] == 0.7  # of which nothing is recorded
    assert not {(v, w) for v, w in shares if w in ("edit", "code") and v != "ngram"}
    told = {"acceptance_by_kind": {"story": 0.4}}
    older = lab.points(SHAPE, CEILINGS, about={"draft": told, "eagle": told})
    assert {accepted(p) for p in older if p.key.startswith("draft-2/story/")} == {0.4}
    found = {
        (p.variant.name, p.workload.name): guessed(p)
        for p in points
        if (p.variant.name, p.workload.name) in shares
    }
    assert found["ngram", "quote"] == 0.8
    assert found["ngram", "story"] == 0.2
    assert found["draft-2", "story"] == 1.0
    claims = {c.name: c for c in lab.claims}
    ((copying, plain),) = lab.pairs(claims["ngram-quote"], points)
    always = tpot_ratio(copies_accepted)(copying, plain).value
    seldom = claims["ngram-quote"].predict(copying, plain)
    assert always < seldom.value < 1
    assert "f = 0.80" in seldom.assumptions[0]
