"""What xgrammar makes of the lab's schema: why some whole answers are no JSON, as the report says.

With another xgrammar these tests say whether that is still so.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from loadtests.structures import example, spec
from serving import machine
from serving.models import ROOT

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(machine.detect().kind != "cpu", reason="the same wherever it runs"),
]
ACCEPTED = """
import json, sys
from xgrammar import Grammar
from xgrammar.testing import _is_grammar_accept_string
given = json.load(sys.stdin)
compact = {"any_whitespace": False, "separators": (",", ":")}
grammar = Grammar.from_json_schema(json.dumps(given["schema"]), **compact)
print(json.dumps([_is_grammar_accept_string(grammar, text) for text in given["texts"]]))
"""


def accepted(schema: dict[str, Any], *names: str) -> list[bool]:
    """Whether an answer with each of these names is let through; xgrammar imports PyTorch."""
    texts = [example("record").replace("bridge", name) for name in names]
    done = subprocess.run(
        [sys.executable, "-c", ACCEPTED],
        cwd=ROOT,
        input=json.dumps({"schema": schema, "texts": texts}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[bool] = json.loads(done.stdout)
    return found


def test_a_bounded_string_may_hold_control_characters_and_no_escape() -> None:
    schema = spec("record")["json"]
    names = ("river", "a\tb", "a\x01b", "a\nb", "a\\tb")
    assert accepted(schema, *names) == [True, True, True, False, False]
    schema["properties"]["name"] = {"type": "string", "pattern": "^.{0,8}$"}
    assert accepted(schema, *names[:4]) == [True, False, False, False]
