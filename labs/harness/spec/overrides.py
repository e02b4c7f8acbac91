"""Reads changes of a lab as a reader writes them in `SET=`, and applies them to its plain fields.

A path names a field, and an item of a list by its name: `workloads.fixed.output_tokens.tokens`.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from labs.harness.spec.errors import LabError, did_you_mean


def parse_changes(text: str) -> dict[str, Any]:
    """Read `window_s=4 workloads.fixed.output_tokens.tokens=16` as {path: value}.

    A value is read as JSON where that is possible, and is text otherwise. Raises LabError for an
    item without an equals sign.
    """
    changes: dict[str, Any] = {}
    for item in text.split():
        path, equals, value = item.partition("=")
        if not equals:
            raise LabError(f"SET: {item!r} is not field=value")
        try:
            changes[path] = json.loads(value)
        except json.JSONDecodeError:
            changes[path] = value
    return changes


def set_field(fields: dict[str, Any], path: str, value: Any) -> None:
    """Change an existing field in place; the items of a list are addressed by their names.

    Raises LabError for a path that leads to none.
    """
    *parents, last = path.split(".")
    at: Any = fields

    def require(step: str, free: bool) -> dict[str, Any]:
        known = _steps(at)
        if step not in known and not free:
            names = ", ".join(known) or "none"
            raise LabError(f"{path}: no field {step!r}{did_you_mean(step, known)} here: {names}")
        return known

    for place, step in enumerate(parents, 1):
        known = require(step, free=False)
        at = at[step] if isinstance(at, dict) else at[known[step]]
        if at is None:
            whole = ".".join(parents[:place])
            raise LabError(f"{path}: there is no {step} here yet: give all of it, {whole}={{JSON}}")
    require(last, free=bool(parents) and parents[-1] == "flags")  # vLLM knows its flags
    if not isinstance(at, dict):
        raise LabError(f"{path}: give one of its fields, {path}.<field>=")
    at[last] = value


def parts_kept(changes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Part the changes from the lists of names that say which variants and workloads are kept."""

    def is_list_of_names(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)

    kept = {k: changes[k] for k in ("variants", "workloads") if is_list_of_names(changes.get(k))}
    return {k: v for k, v in changes.items() if k not in kept}, kept


def known_names(part: str, wanted: Collection[str] | None, known: Sequence[str]) -> set[str]:
    """Return the wanted names, all by default. Raises LabError for one that is not known."""
    for name in wanted or ():
        if name not in known:
            raise LabError(
                f"{part}: no {name!r}{did_you_mean(name, known)} here: {', '.join(known)}"
            )
    if wanted is not None and not wanted:
        raise LabError(f"{part}: keep at least one; known here: {', '.join(known)}")
    return set(known if wanted is None else wanted)


def in_words(error: ValidationError, fields: Mapping[str, Any]) -> str:
    """Word the first error, with the items of a list called by name as in a change's path."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ").replace("valid tuple", "list in JSON")
    if not first["loc"]:
        return message
    at: Any = fields
    steps = []
    for step in first["loc"]:
        if isinstance(at, dict):
            at = at.get(step)
        else:
            at = at[step] if isinstance(at, list | tuple) and isinstance(step, int) else None
        steps.append(str(at["name"] if isinstance(at, dict) and isinstance(step, int) else step))
    value = textwrap.shorten(repr(first["input"]), 80, placeholder=" ..")
    return f"{'.'.join(steps)}: {message} (given {value})"


def _steps(at: Any) -> dict[str, Any]:
    if isinstance(at, dict):
        return {key: key for key in at}
    if isinstance(at, list | tuple):
        return {
            item["name"]: i
            for i, item in enumerate(at)
            if isinstance(item, dict) and "name" in item
        }
    return {}
