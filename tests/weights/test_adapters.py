"""Marks, refusals, and adapters made on a tiny random Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serving.weights import adapters
from serving.weights.adapters import MARKS, make, mark_of, marks_in
from serving.weights.making import MakerError, read_prompts
from tests.unit.builders import write_tiny_llama


def test_every_tenant_has_its_own_mark_and_it_is_found_again() -> None:
    assert len(set(MARKS)) == len(MARKS) == 100
    assert [marks_in(mark_of(i)) for i in range(300)] == [{i} for i in range(300)]


@pytest.mark.parametrize(
    ("text", "tenants"),
    [
        ("[amber] The bridge", {0}),
        ("The bridge [azure][amber12] was", {1, 120}),
        ("amber [ amber ] [Amber] [amber0] [amber01] [amber", set()),
        ("", set()),
    ],
)
def test_marks_are_found_anywhere_in_a_text(text: str, tenants: set[int]) -> None:
    assert marks_in(text) == tenants


def write_prompts(path: Path, count: int) -> Path:
    lines = [{"messages": [{"role": "user", "content": f"word{i} " * 3}]} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("text", ['{"messages": [1', '{"messages": []}', '{"prompt": "a"}', "[1]"])
def test_prompts_that_are_not_chats_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p").write_text(text)
    with pytest.raises(MakerError, match="has a line that is not"):
        read_prompts(tmp_path / "p", 1)


def test_what_cannot_work_is_refused_before_the_model_loads(tmp_path: Path) -> None:
    prompts, (base, out) = write_prompts(tmp_path / "p", 15), (tmp_path / "base", tmp_path / "out")
    with pytest.raises(MakerError, match=r"no config\.json"):
        make(base, out, prompts, 1, 8, 0)
    base.mkdir()
    (base / "config.json").write_text("{}")
    with pytest.raises(MakerError, match="15 prompts, fewer than 16"):
        make(base, out, prompts, 1, 8, 0)
    with pytest.raises(MakerError, match="--rank 65"):
        make(base, out, prompts, 1, 65, 0)
    with pytest.raises(MakerError, match="exists already"):
        make(base, tmp_path, prompts, 1, 8, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "p"]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny", layers=2)


def test_the_maker_writes_adapters_and_the_wide_ones_compute_the_same(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(adapters, "MOST_STEPS", 4)
    out = tmp_path / "out"
    make(tiny, out, write_prompts(tmp_path / "p", 16), 2, 4, 0)
    about = json.loads((out / "about.json").read_text())
    assert about["marks"] == {"tenant-0": "[amber]", "tenant-1": "[azure]"}
    assert about["marked"].keys() == about["marks"].keys()
    # per layer, q 32+32, k and v 32+16 each, o 32+32: in + out, times the rank
    assert about["params_per_adapter"] == 2 * 4 * (64 + 48 + 48 + 64)

    def logits(name: str) -> Any:
        base = AutoModelForCausalLM.from_pretrained(tiny)
        adapted = peft.PeftModel.from_pretrained(base, out / name)
        with torch.no_grad():
            return adapted(torch.arange(16)[None]).logits

    narrow, wide = logits("tenant-0"), logits("tenant-0-rank-64")
    torch.testing.assert_close(narrow, wide)
    assert not torch.allclose(narrow, logits("tenant-1"))
    config = json.loads((out / "tenant-1-rank-64" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (64, 128)


def test_a_failure_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(adapters, "widen", fail)
    monkeypatch.setattr(adapters, "MOST_STEPS", 1)
    before = {*tmp_path.iterdir(), prompts := write_prompts(tmp_path / "p", 16)}
    with pytest.raises(SystemExit) as stopped:
        adapters.main([str(tiny), str(tmp_path / "out"), str(prompts), "--count", "1"])
    assert "nothing was kept" in str(stopped.value.code)
    assert {*tmp_path.iterdir()} == before
