"""Flags of engines, by the engines' own names, and which of them may come from anybody.

A folder of results is data: whoever repeats it must not run its author's code. So a flag that comes
from a recorded run or from `SET=` is passed on only where the engine's `Harmless` has it, with a
value of its type there: what the labs use, and what only sets a size, a number type or a strategy.
Everything else is refused by name.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints, ValidationError

FlagValue = str | int | float | bool | dict[str, object] | list[str]
Flags = Mapping[str, FlagValue]  # without the leading dashes

Tokens = Annotated[int, Field(le=10**7)]
Count = Annotated[int, Field(le=10**5)]  # of what is prepared for each: requests, adapters, devices
Servers = Annotated[int, Field(ge=1, le=64)]  # each is a process, which imports vLLM
Blocks = Annotated[int, Field(le=10**9)]
Bytes = Annotated[int, Field(le=10**15)]
Seed = Annotated[int, Field(le=2**63 - 1)]
Sizes = Annotated[list[Count], Field(max_length=10**4)]
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]  # no path
Derived = Annotated[str, StringConstraints(pattern=r"^<[a-z][a-z0-9-]*>$")]  # made by the lab
Adapter = Annotated[str, StringConstraints(pattern=r"^\w[\w-]*=<[a-z][a-z0-9-]*>/\w[\w-]*$")]


class TypedFlags(dict[str, FlagValue]):
    """An engine's flags by its own names, with access to their values by type."""

    def integer(self, name: str, default: int | None = None) -> int:
        """Read a whole number: a flag, or `default` where it is not set.

        Raises KeyError where it has neither, and ValueError where it is no whole number.
        """
        return int(str(self[name] if default is None else self.get(name, default)))


class WholeNumber:
    """A flag that is a whole number, as an attribute of flags; its name has dashes instead."""

    def __init__(self, default: int | None = None) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._flag = name.replace("_", "-")

    def __get__(self, flags: TypedFlags, owner: type) -> int:
        return flags.integer(self._flag, self._default)


class Switch:
    """A flag that is on or off, as an attribute of flags; its name has dashes instead."""

    def __init__(self, default: bool) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._flag = name.replace("_", "-")

    def __get__(self, flags: TypedFlags, owner: type) -> bool:
        return bool(flags.get(self._flag, self._default))


class Harmless(
    BaseModel,
    frozen=True,
    extra="forbid",
    strict=True,
    alias_generator=lambda name: name.replace("_", "-"),
):
    """Lists an engine's flags that load no code, open no address and name no path."""

    @classmethod
    def names(cls) -> list[str]:
        """Return the flags' names."""
        return [str(field.alias) for field in cls.model_fields.values()]

    @classmethod
    def refusal(cls, flags: Mapping[str, object]) -> str:
        """Say which flag is refused and why; empty where all are harmless."""
        try:
            cls.model_validate(dict(flags))
        except ValidationError as error:
            name, *within = map(str, error.errors()[0]["loc"])
            if name in cls.names():
                place = ".".join([name, *(step for step in within if step.isidentifier())])
                return f"{place} has a value that is not known to be harmless"
            near = difflib.get_close_matches(name, cls.names(), 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            return f"{name} is not among the flags that are known to be harmless{hint}"
        return ""


def with_places(flags: Flags, places: Mapping[str, Path]) -> dict[str, FlagValue]:
    """Replace `<name>` in flags by the folder of that derived model on this machine."""
    text = json.dumps(dict(flags))
    for name, path in places.items():
        text = text.replace(f"<{name}>", json.dumps(str(path))[1:-1])  # within a string of JSON
    replaced: dict[str, FlagValue] = json.loads(text)
    return replaced
