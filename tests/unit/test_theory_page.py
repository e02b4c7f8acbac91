"""The formulas of the planner's page give what labs/harness/spec/theory.py gives, on a grid."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from labs.harness.reports.dials import cards, shipped_shape
from labs.harness.reports.pages import WEB
from labs.harness.spec import theory
from serving.hardware.machine import Ceilings
from serving.models.catalog import Shape

DENO = shutil.which("deno", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
SHAPES = ("llama-1b", "llama-8b", "moe-30b")
CASES = """
const [cases] = JSON.parse(await new Response(Deno.stdin.readable).text());
console.log(JSON.stringify(cases.map(([name, ...given]) => ({prefillFlops, prefillS, decodeBytes,
  decodeFlops, decodeStepS, kvTokens, stepBytes, heldBytes})[name](...given))));
"""


def cases() -> list[tuple[list[object], float]]:
    """Each function with its arguments, and what Python makes of them."""
    found: list[tuple[list[object], float]] = []
    for name, card in itertools.product(SHAPES, cards()[::3]):
        shape, at = shipped_shape(name), card.ceilings
        found += _of(shape, at)
    return found


def _of(shape: Shape, at: Ceilings) -> list[tuple[list[object], float]]:
    s = asdict(shape)
    ceilings = {
        "bytes_per_s": at.memory_bandwidth_bytes_per_s, "flops_per_s": at.bf16_flops_per_s
    }  # fmt: skip
    found: list[tuple[list[object], float]] = [(["heldBytes", s], shape.held_bytes)]
    for tokens, batch in itertools.product((1, 512, 8000), (1, 16, 512)):
        found += [
            (["stepBytes", s, batch], shape.step_bytes(batch)),
            (["prefillFlops", s, tokens, tokens // 2],
             theory.prefill_flops(shape, tokens, tokens // 2)),
            (["prefillS", s, ceilings, tokens], theory.prefill_s(shape, at, tokens)),
            (["decodeBytes", s, batch, tokens, 1], theory.decode_bytes(shape, batch, tokens, 1)),
            (["decodeFlops", s, batch, tokens], theory.decode_flops(shape, batch, tokens)),
            (["decodeStepS", s, ceilings, batch, tokens, 2],
             theory.decode_step_s(shape, at, batch, tokens)),
            (["kvTokens", s, batch * 10**8, 1, 16],
             theory.kv_tokens(shape, batch * 10**8, 1, 16)),
        ]  # fmt: skip
    return found


@pytest.mark.skipif(DENO is None, reason="no deno: `make setup` brings it")
def test_the_page_computes_what_theory_computes(tmp_path: Path) -> None:
    program = tmp_path / "cases.js"
    program.write_text((WEB / "theory.js").read_text().replace('"use strict";', "") + CASES)
    asked = cases()
    ended = subprocess.run(
        [str(DENO), "run", "--no-remote", str(program)], text=True, capture_output=True,
        input=json.dumps([[given for given, _ in asked]]),
        env={**os.environ, "DENO_DIR": str(tmp_path), "NO_COLOR": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    for (given, expected), got in zip(asked, json.loads(ended.stdout), strict=True):
        assert got == pytest.approx(expected, rel=1e-9), (given[0], given[2:])
