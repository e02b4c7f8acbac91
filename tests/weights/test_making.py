"""What the makers of models share, and how they are called, on a tiny random Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serving.models import kv_heads, making, outliers, prune, sparsity
from serving.models.__main__ import main
from serving.models.making import MakerError
from tests.unit.builders import write_tiny_llama
from tests.weights import needs_torch, torch

pytestmark = needs_torch


def test_answers_are_greedy_whatever_a_model_recommends(tmp_path: Path) -> None:
    _, model = making.load(write_tiny_llama(tmp_path / "tiny", layers=2, initializer_range=0.3))
    answer = making.answer(model, [[5, 6, 7]], 24, eos_token_id=-1).tolist()
    model.generation_config.repetition_penalty = 50.0
    assert making.answer(model, [[5, 6, 7]], 24, eos_token_id=-1).tolist() == answer
    repeated = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=24, eos_token_id=-1)
    assert repeated[:, 3:].tolist() != answer  # the recommendation would have been felt


def test_a_folder_appears_complete_with_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(base: Path, out: Path, method: str) -> dict[str, Any]:
        assert not (tmp_path / "out").exists()
        (out / "x").write_text(base.name)
        return {"method": method}

    monkeypatch.setattr(kv_heads, "make", make)
    argv = ["kv_heads", str(tmp_path / "base"), str(tmp_path / "out"), "--method", "mha"]
    main(argv)
    assert (tmp_path / "out" / "x").read_text() == "base"
    record = json.loads((tmp_path / "out" / "about.json").read_text())
    assert record.pop("seconds") >= 0
    assert record == {"method": "mha"}
    with pytest.raises(SystemExit, match="exists already"):
        main(argv)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyboardInterrupt(), "nothing was kept"),
        (MakerError("it has no heads"), "it has no heads"),
        (torch.OutOfMemoryError("Tried to allocate 2 GiB"), "too little memory to make out: Tried"),
    ],
)
def test_a_failure_is_a_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, told: str
) -> None:
    def fail(base: Path, out: Path) -> None:
        (out / "half").touch()
        raise error

    monkeypatch.setattr(kv_heads, "make", fail)
    with pytest.raises(SystemExit, match=told):
        main(["kv_heads", str(tmp_path), str(tmp_path / "out")])
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("nested", [False, True])
def test_a_mixture_of_experts_is_refused_before_it_is_loaded(
    tmp_path: Path, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"num_local_experts": 8, "num_experts_per_tok": 2}
    written = {"text_config": config} if nested else config
    (tmp_path / "config.json").write_text(json.dumps(written))
    monkeypatch.setattr(making, "load", pytest.fail)
    given = (tmp_path, tmp_path / "out")
    source = tmp_path / "config.json"
    refused = r" is a mixture of 8 experts, .* a dense model"
    with pytest.raises(MakerError, match=refused):
        prune.make(*given, "magnitude-50", source)
    for study in (sparsity, outliers):
        with pytest.raises(MakerError, match=refused):
            study.make(*given, source)
