"""Settings and targets, as make and the command line read them: from the tables of docs/knobs.md.

The Makefile runs this file where a call has settings, or a target that it does not know, and to
explain a target, before anything is installed. So it needs Python alone.
"""

from __future__ import annotations

import difflib
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LABS = Path(__file__).parents[2]
ROOT = LABS.parent
PAGE = next(f for place in (ROOT, LABS) if (f := place / "docs" / "knobs.md").exists())
"""In a clone; or where the package has it. This file needs Python alone, and knows no other."""
PREFIX = "LABS_"
SETTING = re.compile(r"^\| `([A-Z_]+)=([^`]*)` \| (.+) \| ([^|]+) \|$", re.M)
REMOVED = Path(__file__).with_name(
    "removed.txt"
)  # a target or setting a line, and what is used instead
PHONY = re.compile(r"^\.PHONY: (.+)$", re.M)
REFERENCE = re.compile(r" \(\[[^]]*\]\([^)]*\)\)")  # a link in parentheses
LINK, WORDS_OF_LINK = re.compile(r"\[([^]]*)\]\([^)]*\)"), r"\1"
DOES = re.compile(r"^([a-z%-]+):[^#\n]*## (.+)$", re.M)  # a target of the Makefile
ONE_LAB = "lab-<name>"
ALL = "all"  # in the column of targets


@dataclass(frozen=True)
class Setting:
    """Holds a row: a name, how it is typed, what it does, and the targets that take it."""

    name: str
    typed: str
    does: str  # Markdown
    targets: tuple[str, ...]  # names, `lab-<name>` for every lab; `all` for every target

    @property
    def words(self) -> str:
        """What it does, without links."""
        return LINK.sub(WORDS_OF_LINK, REFERENCE.sub("", self.does))

    def fits(self, target: str) -> bool:
        """Tell whether a target takes it."""
        return ALL in self.targets or target_of(target) in self.targets


def target_of(goal: str) -> str:
    """Name a target as the page does, where that of every lab is `lab-<name>`."""
    return ONE_LAB if goal.startswith("lab-") else goal


@cache
def settings() -> tuple[Setting, ...]:
    """Read every row; a name that means something else to other targets has several."""
    return tuple(
        Setting(name, f"{name}={value}", does, tuple(re.findall(r"[\w<>-]+", targets)))
        for name, value, does, targets in SETTING.findall(PAGE.read_text(encoding="utf-8"))
    )


def setting(name: str, target: str) -> Setting:
    """Find what a setting means to a target. Raises KeyError where it is not on the page."""
    for row in settings():
        if row.name == name and row.fits(target):
            return row
    raise KeyError(f"docs/knobs.md has no row of {name}= for {target}")


def names() -> list[str]:
    """Name every setting, in alphabetical order."""
    return sorted({row.name for row in settings()})


def targets() -> list[str]:
    """Name the targets of the Makefile."""
    listed = PHONY.search((ROOT / "Makefile").read_text(encoding="utf-8"))
    return listed[1].split() if listed else []


def gone() -> dict[str, str]:
    """Map what was removed, as `make draft` or `PP=`, to what is used instead."""
    lines = REMOVED.read_text(encoding="utf-8").splitlines()
    return dict(line.split(": ", 1) for line in lines)


def refusal(goals: Sequence[str], given: Sequence[str]) -> str:
    """Say in a sentence why a call of make is refused, and what mends it; empty where it is not.

    `given` are the names of the settings behind the targets.
    """
    for goal in goals:
        if goal not in targets() and not goal.startswith("lab-"):
            return _not_there(f"make {goal}", [f"make {name}" for name in targets()])
    for name in given:
        if name not in names():
            return _not_there(f"{name}=", [f"{known}=" for known in names()])
    typed = f"make {' '.join(goals)}"
    taken = [name for name in names() if any(is_taken(goal, name) for goal in goals)]
    wrong = [f"{name}=" for name in given if name not in taken]
    if not goals or not wrong:
        return ""
    takes = ", ".join(f"{name}=" for name in taken)
    return f"{', '.join(wrong)} would change nothing here: {typed} takes {takes}"


def explanation(goal: str) -> str:
    """Say what a target does, and how each of its settings is typed behind it."""
    does = dict(DOES.findall((ROOT / "Makefile").read_text(encoding="utf-8")))
    own = [row for row in settings() if row.fits(goal) and ALL not in row.targets]
    shared = ", ".join(row.name + "=" for row in settings() if ALL in row.targets)
    lines = [f"make {goal}: {does.get('lab-%' if goal.startswith('lab-') else goal, '')}", ""]
    for row in own:
        lines.append(f"  {row.typed}")
        lines += [f"    {line}" for line in textwrap.wrap(row.words, 90)]
    lines += [""] * bool(own)
    return "\n".join([*lines, f"As every target it takes {shared} (docs/knobs.md)."])


def is_taken(goal: str, name: str) -> bool:
    """Tell whether a target takes a setting."""
    return any(row.name == name and row.fits(goal) for row in settings())


def _not_there(wanted: str, known: Sequence[str]) -> str:
    if instead := gone().get(wanted):
        return f"{wanted} was removed: use {instead}"
    near = difflib.get_close_matches(wanted, known, 1)
    if near:
        return f"there is no {wanted}: did you mean {near[0]}?"
    return f"there is no {wanted}: `make` lists the targets, docs/knobs.md the settings"


def unread(environment: Iterable[str]) -> Iterator[str]:
    """Say of each variable with the prefix of settings that it is none, and which may be meant."""
    for name in sorted(environment):
        if name.startswith(PREFIX) and name[len(PREFIX) :] not in names():
            near = difflib.get_close_matches(name[len(PREFIX) :], names(), 1)
            meant = f"did you mean {PREFIX}{near[0]}?" if near else "docs/knobs.md lists them."
            yield f"{name} in the environment is not a setting and is ignored: {meant}"


if __name__ == "__main__":  # GOALS -- SETTINGS, or --help TARGET GOALS -- what it would have run
    words = sys.argv[1 : sys.argv.index("--")]
    if words[:1] != ["--help"]:
        print(refusal(words, sys.argv[len(words) + 2 :]))
    elif words[1] in words[2:]:
        print(explanation(words[1]))
