"""Refusals, and a draft distilled from a tiny random Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serving import draft
from serving.draft import make
from serving.making import MakerError
from tests.unit.builders import write_tiny_llama


def write_prompts(path: Path, count: int) -> Path:
    lines = [
        {"kind": "even" if i % 2 else "odd", "messages": [{"role": "user", "content": f"{i} " * 3}]}
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_what_cannot_work_is_refused_before_the_model_loads(tmp_path: Path) -> None:
    prompts, (base, out) = write_prompts(tmp_path / "p", 11), (tmp_path / "base", tmp_path / "out")
    with pytest.raises(MakerError, match=r"no config\.json"):
        make(base, out, prompts, 3, 1, 0)
    base.mkdir()
    (base / "config.json").write_text('{"num_hidden_layers": 4}')
    with pytest.raises(MakerError, match="11 prompts, fewer than 12"):
        make(base, out, prompts, 3, 1, 0)
    for layers in (0, 4, 5):
        with pytest.raises(MakerError, match=f"--layers {layers} is not"):
            make(base, out, prompts, layers, 1, 0)
    with pytest.raises(MakerError, match="exists already"):
        make(base, tmp_path, prompts, 3, 1, 0)
    with pytest.raises(MakerError, match="cannot be read"):
        make(base, out, tmp_path / "none", 3, 1, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "p"]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny", layers=4, initializer_range=0.3)


def test_distilling_makes_a_smaller_model_that_agrees_with_the_target(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(draft, "LEARNING_RATE", 1e-2)
    prompts = write_prompts(tmp_path / "p", 48)

    def made(epochs: int) -> dict[str, Any]:
        make(tiny, tmp_path / f"{epochs}", prompts, 2, epochs, 0)
        found: dict[str, Any] = json.loads((tmp_path / f"{epochs}" / "about.json").read_text())
        return found

    untrained, trained = made(0), made(8)
    assert untrained["steps"] == 0
    assert trained["steps"] == 8 * 4
    assert trained["trained_on_tokens"] == 32 * draft.ANSWER_TOKENS
    assert trained["acceptance"] > untrained["acceptance"] + 0.1
    assert trained["acceptance_untrained"] == untrained["acceptance_untrained"]
    assert trained["acceptance_by_kind"].keys() == {"even", "odd"}

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


def test_a_failure_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(draft, "distil", fail)
    before = {*tmp_path.iterdir(), prompts := write_prompts(tmp_path / "p", 12)}
    with pytest.raises(SystemExit) as stopped:
        draft.main([str(tiny), str(tmp_path / "out"), str(prompts)])
    assert "nothing was kept" in str(stopped.value.code)
    assert {*tmp_path.iterdir()} == before
