"""What a run says of quantization tools beyond its claims."""

from __future__ import annotations

from pathlib import Path

import pytest

from labs import LABS
from labs.harness.storage.writing import write_gzip
from labs.quantization_tools.facts import compared_tools
from tests.unit.judged import answered, context

LAB = LABS["quantization-tools"].at("cpu", quick=False).model_copy(update={"requests": 64})


def test_a_tool_is_compared_with_its_heir_and_says_which_is_better(tmp_path: Path) -> None:
    """AutoGPTQ and rounding halve every probability against all others, which are alike."""
    run = context(tmp_path, LAB, {})
    for name in ("gptqmodel", "auto-gptq", "w4a16-rtn", "w4a16-gptq", "w4a16-gptq-code"):
        asked = answered(0.25 if name in ("auto-gptq", "w4a16-rtn") else 0.5, 90)
        write_gzip(run.folder.probe_file("quality", name), {"answers": [asked]})
    found = compared_tools(run)
    assert {name: (of.quality.perplexity_ratio.value, of.better) for name, of in found.items()} == {
        "gptq-heir": (pytest.approx(0.5), "gptqmodel"),
        "gptq-vllm": (pytest.approx(0.5), "w4a16-gptq"),
        "gptq-rtn": (pytest.approx(0.5), "w4a16-gptq"),
        "code-prose": (1, None),
    }
