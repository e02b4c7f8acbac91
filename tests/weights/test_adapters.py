"""Marks, refusals, and adapters made on a tiny random Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serving.models import adapters
from serving.models.adapters import MARKS, make, mark_of, marks_in
from tests.unit.builders import write_tiny_llama
from tests.weights import made


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


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny", layers=2)


def test_the_maker_writes_adapters_and_the_wide_ones_compute_the_same(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    for name, value in {"MOST_STEPS": 4, "TENANTS": 2, "RANK": 4}.items():
        monkeypatch.setattr(adapters, name, value)
    out = tmp_path / "out"
    about = made(make, tiny, out, source=write_prompts(tmp_path / "p", 16))
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
