"""What a check found: one row, passed from the environment to the rehearsal as a line of JSON."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel


class Check(BaseModel, frozen=True, extra="forbid"):
    """One thing that was checked: it passed where there is no error."""

    what: str  # the row of the table that counts it
    name: str
    error: str = ""
    note: str = ""  # of what passed: what it needs on a GPU beside what is rehearsed
    built: str = ""  # what computes the layers of a model that was built
    applies: bool = True  # else it is told, and counted as left out


def last_line(text: str) -> str:
    """Return an exception's last line that says something, cut where it is long."""
    lines = [
        line.strip()
        for line in text.splitlines()
        if line.strip() and not line.lstrip().startswith("For further information visit")
    ]
    return lines[-1][:300] if lines else "no message"


def write(file: Path, checks: Iterable[Check]) -> None:
    """Write checks as lines of JSON, each as soon as it is made."""
    with file.open("w") as out:
        for check in checks:
            out.write(check.model_dump_json() + "\n")
            out.flush()


def read(file: Path) -> list[Check]:
    return [Check.model_validate_json(line) for line in file.read_text().splitlines()]
