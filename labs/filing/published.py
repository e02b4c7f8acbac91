"""What others published of what the labs try: shown beside a lab's own figures, never judged.

A report names a figure with its setting and whose it is, so that a reader sees ours, what theory
says and theirs. It is no part of a lab: a word more here makes no result stale.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, TypeAdapter

FILE = Path(__file__).with_name("published.toml")

Part = Literal["claims", "forecasts", "findings"]


class Published(BaseModel, frozen=True, extra="forbid"):
    figure: str
    source: str
    setting: str = ""  # as far as it is known

    def __str__(self) -> str:
        setting = f", {self.setting}" if self.setting else ""
        return f"{self.figure}{setting} ({self.source})"


@cache
def every() -> dict[str, dict[Part, dict[str, list[Published]]]]:
    """Lab -> kind of its part -> the part's name -> what was published of it."""
    form = TypeAdapter(dict[str, dict[Part, dict[str, list[Published]]]])
    return form.validate_python(tomllib.loads(FILE.read_text()))


def about(lab: str, part: Part, name: str) -> Sequence[Published]:
    return every().get(lab, {}).get(part, {}).get(name, ())
