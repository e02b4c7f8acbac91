"""Structures: the form that an answer must have, as a JSON schema or as a regular expression.

A structure is what vLLM's `structured_outputs` takes: `{"json": schema}` or `{"regex": pattern}`.
Every string is bounded and no key is optional, so that a small model's answer ends, and so that the
shortest valid answer is known to be longer than the answers that are timed: those are cut off at
their number of tokens, and have exactly the length that was asked for, as all other answers.

Structures of one form differ in their mark alone, which is in every key: an engine that has seen
one has not seen the other, and cannot have compiled it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel

Form = Literal["record", "nested", "regex"]
FORMS: tuple[Form, ...] = get_args(Form)
Spec = Mapping[str, Any]
"""What a request's `structured_outputs` holds."""
LEAST_TOKENS = 17
"""The shortest valid answer of any form has at least so many tokens, of any tokenizer in use."""
LONGEST = 8  # of a string of free text, in characters
DEPTH = 4  # objects within objects
PARTS = 4  # of the line that the regular expression matches
_KINDS = ("a letter", "a report", "a map of the coast")


class Structure(BaseModel, frozen=True, extra="forbid"):
    """What the prompts of a workload ask an answer to be, and whether the engine imposes it.

    With `unseen` every request has a structure of its own; otherwise all have the same one.
    """

    form: Form
    imposed: bool = True
    unseen: bool = False

    def spec(self, mark: str) -> Spec:
        """Return the structure of the request with this mark, which only unseen ones have."""
        return spec(self.form, mark if self.unseen else "")


def spec(form: Form, mark: str = "") -> Spec:
    """Return the structure of a form whose keys end in a mark of letters and digits."""
    if form == "regex":
        return {"regex": rf"order{mark}(-(0[1-9]|1[0-2])[A-F]{{3}}[0-9]{{3}}){{{PARTS}}}"}
    if form == "nested":
        inner = _object({f"open{mark}": {"type": "boolean"}})
        for _ in range(DEPTH):
            inner = _object({f"kind{mark}": {"enum": list(_KINDS)}, f"within{mark}": inner})
        return {"json": inner}
    return {
        "json": _object(
            {
                f"name{mark}": {"type": "string", "maxLength": LONGEST},
                f"kind{mark}": {"enum": list(_KINDS)},
                f"year{mark}": {"type": "string", "pattern": "^[0-9]{4}$"},
                f"open{mark}": {"type": "boolean"},
                f"place{mark}": {"type": "string", "maxLength": LONGEST},
            }
        )
    }


def example(form: Form, mark: str = "") -> str:
    """Return a valid answer, as the backends' masks are timed along one."""
    if form == "regex":
        return f"order{mark}" + "-07ABC123" * PARTS
    if form == "nested":
        value: dict[str, Any] = {f"open{mark}": True}
        for level in range(DEPTH):
            value = {f"kind{mark}": _KINDS[level % len(_KINDS)], f"within{mark}": value}
    else:
        value = {
            f"name{mark}": "bridge",
            f"kind{mark}": "a report",
            f"year{mark}": "1904",
            f"open{mark}": True,
            f"place{mark}": "harbour",
        }
    return json.dumps(value, separators=(",", ":"))


def instruction(structure: Spec) -> str:
    """Ask for an answer of this structure in words, as the beginning of a prompt."""
    if "regex" in structure:
        what = f"one line that this regular expression matches: {structure['regex']}"
    else:
        schema = json.dumps(structure["json"], separators=(",", ":"))
        what = f"one JSON object that is valid under this schema: {schema}"
    return f"Answer with {what} Write nothing else. Take the values from this text:"


def beginning(structure: Spec) -> str:
    """Return the characters that every valid answer begins with, spaces left out."""
    if "regex" in structure:
        return str(structure["regex"]).partition("(")[0]
    return f'{{"{next(iter(structure["json"]["properties"]))}":'


def begins_so(text: str, structure: Spec) -> bool:
    """Tell whether an answer, perhaps cut off, begins as every valid one does."""
    begun, wanted = "".join(text.split()), beginning(structure)
    return bool(begun) and (begun.startswith(wanted) or wanted.startswith(begun))


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }
