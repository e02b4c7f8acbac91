"""Find settings in the environment that nothing reads, such as a misspelled LABS_QIUCK."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator

from serving.models import ROOT

PREFIX = "LABS_"
LISTED = re.compile(r"^SETTINGS :=((?:.*\\\n)*.*)$", re.M)  # in the Makefile, over several lines


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
