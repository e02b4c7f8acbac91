"""How a run was made: the quantities that `method.md`, `covers.md` and `repeats.md` say."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from labs.harness.analysis.computed import Summary
from labs.harness.analysis.text import ceilings_text, counted
from labs.harness.analysis.verdicts import (
    CONFIDENCE,
    ENOUGH_STARTS,
    START_SPREAD,
    TWO_ONE_SIDED,
    Judgement,
)
from labs.harness.reports import tables
from labs.harness.spec.lab import Lab
from labs.harness.storage.recorded import Run, Session
from serving.hardware.machine import VLLM
from serving.models.dummy import SUFFIX

CLOCKS_DIFFER_S = 5.0  # of a session's length and of its begin and end, in whole seconds


def known(run: Run, lab: Lab, session: Session | None) -> dict[str, Any]:
    """What a reader needs to make the run again."""
    env = run.environment
    return {
        "machine": run.machine.describe(),
        "ceilings": {
            "text": ceilings_text(run.ceilings),
            "table": tables.ceilings(run.machine, run.ceilings),
        },
        "parameters": f"{run.model_shape['params'] / 1e6:,.0f}",
        "packages": [
            f"{name} {env.packages[name]}"
            for name in (*VLLM, "torch", "locust")
            if name in env.packages
        ],
        "commands": [(name, " ".join(filter(None, argv))) for name, argv in run.argv.items()],
        "cores": {"engine": _listed(env.engine_cores), "client": _listed(env.client_cores)},
        "curve_is_shorter": 0 < lab.curve_repeats < lab.repeats,
        "several_engines": len(lab.variants) > 1,
        "session": session,
        "times": _times(run, session) if session else None,
        "command": _command(run, lab),
        "commit": (env.git_commit or "unknown")[:12]
        + (" with uncommitted changes" if env.git_dirty else ""),
    }


def _listed(cores: Sequence[int]) -> str:
    return ", ".join(map(str, cores)) or "none of its own"


def repeats(lab: Lab, summary: Summary) -> dict[str, Any]:
    """How often each point was measured, and how often it could have been."""
    played = {len(of_point) for of_point in summary.measurements.values()} or {0}
    least, most = min(played), max(played)
    return {
        "text": f"{least} to {most} repeats" if most > least else counted(most, "repeat"),
        "most": lab.rounds if lab.looks > 1 else 0,
        "most_s": f"{lab.most_s:g}",
    }


def covers(lab: Lab, judgements: Sequence[Judgement]) -> dict[str, Any]:
    """What the intervals of the claims cover, and what they do not."""
    effects = [j.effect for j in judgements if j.effect]
    least = min((e.starts for e in effects if e.starts is not None), default=0)
    looks = max((e.looks for e in effects), default=lab.looks)
    level, held = (1 - (1 - share) / looks for share in (CONFIDENCE, TWO_ONE_SIDED))
    return {
        "starts": {
            "least": least,
            "few": 0 < least < ENOUGH_STARTS,
            "enough": ENOUGH_STARTS,
            "spread": f"{START_SPREAD:.1%}",
        },
        "paired": sum(e.paired for e in effects),
        "looks": {
            "fewer": looks < lab.looks,
            "several": looks > 1,
            "confidence": f"{CONFIDENCE:.0%}",
            "level": f"{level:.1%}",
            "one_sided": f"{TWO_ONE_SIDED:.0%}",
            "held": f"{held:.0%}",
        },
    }


def was_resumed(run: Run, session: Session) -> bool:
    """Tell whether a run began before its last session, whose times alone are on file.

    False where the file does not say when that session ended, as in older runs.
    """
    if session.ended_at is None:
        return False
    began, ended = (datetime.fromisoformat(at) for at in (run.started_at, session.ended_at))
    return (ended - began).total_seconds() > session.wall_s + CLOCKS_DIFFER_S


def _times(run: Run, session: Session) -> dict[str, Any]:
    """Where the time of the session went, in whole seconds."""
    overhead_s = session.wall_s - session.engine_start_s - session.load_s
    return {
        "resumed": was_resumed(run, session),
        "wall": f"{session.wall_s:.0f}",
        "starting": f"{session.engine_start_s:.0f}",
        "load": f"{session.load_s:.0f}",
        "overhead": f"{overhead_s:.0f}",
        "overhead_share": f"{overhead_s / session.wall_s:.0%}",
    }


def _command(run: Run, lab: Lab) -> str:
    """The command that makes the same run."""
    command = f"make lab-{lab.name}{' QUICK=1' if run.quick else ''}{' AA=1' if run.aa else ''}"
    translated = {name: value for name, value in run.changes.items() if name.isupper()}
    if translated:  # from another tool's command
        settings = (f"{name}={shlex.quote(value)}" for name, value in translated.items())
        command = f"make reproduce {' '.join(settings)}"
    if run.dummy:
        command += f" WEIGHTS=dummy MODEL={run.model.removesuffix(SUFFIX)}"
    if changes := [f"{k}={v}" for k, v in run.changes.items() if k not in translated]:
        command += f" SET='{' '.join(changes)}'"
    return command
