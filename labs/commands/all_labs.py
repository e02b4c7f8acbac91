"""Keep track of a sitting that runs every lab and may be interrupted: what is begun and done."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from labs.comparing import leaderboards
from labs.filing.bounded import DamagedError
from labs.filing.results import RESULTS, read_json, write_json
from serving.engines.vllm import Vllm
from serving.models import CACHE, ROOT

FILE = CACHE / "labs-all.json"


class Sitting(BaseModel, extra="forbid"):
    """Records which labs a sitting has begun and finished; other settings are another sitting."""

    quick: bool
    model: str
    weights: str = ""
    parallel: dict[str, int] = {}  # TP, DP and PP, as vLLM's flags
    vllm: str = ""
    results: str
    begun: list[str] = []
    done: dict[str, str] = {}  # lab -> its run's folder

    def begin(self, lab: str) -> bool:
        """Record that a lab is being run; true where it was begun before, so that it is resumed."""
        begun_before = lab in self.begun
        if not begun_before:
            self.begun.append(lab)
        write_json(FILE, self)
        return begun_before

    def finish(self, lab: str, run: Path) -> None:
        """Record the folder of a lab's complete run."""
        self.done[lab] = os.path.relpath(run, ROOT)
        write_json(FILE, self)

    def page(self) -> Path | None:
        """Write the page of the machine that ran; None where no lab was finished."""
        homes = {(ROOT / run).resolve().parent.parent for run in self.done.values()}
        return leaderboards.write_machine(homes.pop()) if homes else None

    def end(self) -> None:
        """Forget the sitting, so that the next call starts a new one."""
        FILE.unlink(missing_ok=True)


def start(
    quick: bool,
    model: str,
    fresh: bool,
    weights: str = "",
    parallel: Mapping[str, int] | None = None,
) -> Sitting:
    """Return the unfinished sitting with these settings, or a new one."""
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
        unfinished = read_json(FILE, Sitting)
    except DamagedError:
        return new
    same = unfinished.model_copy(update={"begun": [], "done": {}}) == new
    done = unfinished.done.items()
    finished = {lab: run for lab, run in done if (ROOT / run / "COMPLETE").exists()}
    return unfinished.model_copy(update={"done": finished}) if same else new
