"""Running every lab in one sitting that may be interrupted: what is begun, what is done."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from labs.comparing import leaderboards
from labs.filing.results import RESULTS, DamagedError, read_json, write_json
from serving.engines.vllm import Vllm
from serving.models import CACHE, ROOT

FILE = CACHE / "labs-all.json"


class Sitting(BaseModel, extra="forbid"):
    """Labs by name; a sitting with other settings is another sitting."""

    quick: bool
    model: str
    weights: str = ""
    parallel: dict[str, int] = {}  # TP, DP and PP, as vLLM's flags
    vllm: str = ""
    results: str
    begun: list[str] = []
    done: dict[str, str] = {}  # lab -> its run's folder

    def begin(self, lab: str) -> bool:
        """Note that a lab is being run; true where it was begun before, so that it is resumed."""
        before = lab in self.begun
        if not before:
            self.begun.append(lab)
        write_json(FILE, self)
        return before

    def finish(self, lab: str, run: Path) -> None:
        self.done[lab] = os.path.relpath(run, ROOT)
        write_json(FILE, self)

    def page(self) -> Path | None:
        """The summary page of the machine that ran; none where nothing was finished."""
        homes = {(ROOT / run).resolve().parent.parent for run in self.done.values()}
        return leaderboards.write_machine(homes.pop()) if homes else None

    def end(self) -> None:
        FILE.unlink(missing_ok=True)


def start(
    quick: bool,
    model: str,
    fresh: bool,
    weights: str = "",
    parallel: Mapping[str, int] | None = None,
) -> Sitting:
    """The unfinished sitting with these settings, or a new one."""
    new = Sitting(
        quick=quick,
        model=model,
        weights=weights,
        parallel=dict(parallel or {}),
        vllm=Vllm.version(),
        results=str(RESULTS),
    )
    if fresh or not FILE.exists():
        return new
    try:
        old = read_json(FILE, Sitting)
    except DamagedError:
        return new
    same = old.model_copy(update={"begun": [], "done": {}}) == new
    kept = {lab: run for lab, run in old.done.items() if (ROOT / run / "COMPLETE").exists()}
    return old.model_copy(update={"done": kept}) if same else new
