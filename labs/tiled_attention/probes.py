"""Have attention timed by itself, in a process of its own on the engine's cores.

It is done after the predictions are on file and before any engine starts, once in a run; the
figures stay with the run, so that its report is computed from them and not from another timing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import orjson
from pydantic import ValidationError

from labs.harness.plan.progress import ProgressDisplay
from labs.harness.plan.resolve import Setup
from labs.harness.plan.side_process import ask
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_gzip
from serving.hardware import machine as machines
from serving.hardware.attention import AttentionPlan, AttentionTimes

ARGV: Sequence[str] = (sys.executable, "-m", "serving.hardware.attention")
LIMIT_S = 300


def before_engines(setup: Setup, folder: RunFolder, progress: ProgressDisplay) -> None:
    """Time attention at the lab's lengths, and file the figures, unless they are on file.

    Where that fails the run goes on without them, and says why. An endpoint's kernels are not this
    machine's: they are not timed.
    """
    lengths, kind = setup.lab.attention_tokens, setup.machine.kind
    if not lengths or setup.endpoint or folder.probe_file("attention").exists():
        return
    plan = AttentionPlan(
        config=setup.model.path / "config.json",
        device="cuda" if kind == "gpu" else "cpu",
        cores=machines.timing_cores(kind),
        cache_bytes=setup.machine.caches_bytes.get("L2"),
        lengths_tokens=lengths,
    )
    began = time.monotonic()
    progress.waiting("timing attention with and without tiling")
    lines, why = ask("attention timer", ARGV, [plan.model_dump_json()], LIMIT_S)
    try:
        times = AttentionTimes.model_validate_json(lines[-1] if lines else "")
    except ValidationError:
        why = why or "it printed no figures"
        progress.message(f"Attention by itself could not be timed: {why}")
        return
    write_gzip(folder.probe_file("attention"), orjson.loads(times.model_dump_json()))
    progress.message(f"Attention was timed by itself in {time.monotonic() - began:.0f} s")
