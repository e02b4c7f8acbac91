"""Find settings that nothing reads: a misspelled LABS_QIUCK, or a TRACE= behind `make report`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Set

from serving.weights.models import ROOT

PREFIX = "LABS_"
LISTED = re.compile(r"^SETTINGS :=((?:.*\\\n)*.*)$", re.M)  # in the Makefile, over several lines


BEHIND_MAKE = "MAKE_SETTINGS"  # the names that were given behind the target
FOR_ANY_COMMAND = {"VLLM"}  # the environment that the command runs in, to all but `bundle`


def not_taken(given: str, of_command: Set[str], of_other_commands: Set[str]) -> str | None:
    """Say which settings behind a target its command does not take; None where it takes all.

    `given` are names, separated by spaces; `of_command` the options of the command and
    `of_other_commands` those of all the others, as LABS_QUICK. What is no command's option, such as
    RESULTS, is a setting of all of them.
    """
    names = [f"{PREFIX}{name}" for name in given.split() if name not in FOR_ANY_COMMAND]
    wrong = [name for name in names if name in of_other_commands - of_command]
    if not wrong:
        return None
    listed, takes = (
        ", ".join(f"{name.removeprefix(PREFIX)}=" for name in names)
        for names in (wrong, sorted(of_command))
    )
    return f"{listed} would change nothing here: this command takes {takes or 'no settings'}"


def unread(names: Iterable[str]) -> Iterator[str]:
    """Say of each name with the prefix of settings that it is none, and which may be meant."""
    makefile = ROOT / "Makefile"
    listed = LISTED.search(makefile.read_text()) if makefile.exists() else None
    if listed is None:
        return
    known = listed[1].replace("\\", "").split()
    for name in sorted(names):
        setting = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and setting not in known:
            near = difflib.get_close_matches(setting, known, 1)
            meant = f"did you mean {PREFIX}{near[0]}?" if near else "`make` lists the settings."
            yield f"{name} in the environment is not a setting and is ignored: {meant}"
