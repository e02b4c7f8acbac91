"""What xgrammar makes of the lab's schema: why some whole answers are no JSON, as the report says.

With another xgrammar these tests say whether that is still so.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest

from loadtests.structures import example, spec
from serving.hardware import machine
from serving.models.catalog import ROOT
from tests import with_vllm

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(machine.detect().kind != "cpu", reason="the same wherever it runs"),
]
ACCEPTED = """
import json, sys
from xgrammar import Grammar
from xgrammar.testing import _is_grammar_accept_string
compact = {"any_whitespace": False, "separators": (",", ":")}
accepted = []
for schema, texts in json.load(sys.stdin):
    grammar = Grammar.from_json_schema(json.dumps(schema), **compact)
    accepted.append([_is_grammar_accept_string(grammar, text) for text in texts])
print(json.dumps(accepted))
"""


IMPORTED = """
from serving.models import grammar_masks
for name in grammar_masks.BACKENDS:
    grammar_masks._backend(name)
import lmformatenforcer.integrations.vllm
print("MistralTokenizer" in dir(lmformatenforcer.integrations.vllm))
"""


def test_lm_format_enforcer_imports_what_vllm_has_moved() -> None:
    argv = with_vllm.python("-c", IMPORTED)
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["True"]), done.stderr[-2000:]


def accepted(*asked: tuple[dict[str, Any], Sequence[str]]) -> list[list[bool]]:
    """For each schema, whether an answer with each of these names is let through."""
    given = [
        (schema, [example("record").replace("bridge", name) for name in names])
        for schema, names in asked
    ]
    done = subprocess.run(
        with_vllm.python("-c", ACCEPTED),
        cwd=ROOT,
        input=json.dumps(given),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[list[bool]] = json.loads(done.stdout)
    return found


def test_a_bounded_string_may_hold_control_characters_and_no_escape() -> None:
    bounded, patterned = spec("record")["json"], deepcopy(spec("record")["json"])
    patterned["properties"]["name"] = {"type": "string", "pattern": "^.{0,8}$"}
    names = ("river", "a\tb", "a\x01b", "a\nb", "a\\tb")
    assert accepted((bounded, names), (patterned, names[:4])) == [
        [True, True, True, False, False],
        [True, False, False, False],
    ]
