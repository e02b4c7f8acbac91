"""Bounds on what a run may ask of the machine that it is on: its cores, memory and disk.

The bounds of a lab's fields (`spec.py`) are the same everywhere. Within them a run that was
recorded on a larger machine, or made up by somebody, may still ask for more than there is here. All
of that is checked here, for every run, before any of it starts. What an engine computes with is its
own to check (`Engine.require_devices`, `require_memory`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

from labs.harness.spec.lab import Lab, LabError
from serving.engines import ENGINES
from serving.hardware.host_memory import available_bytes
from serving.hardware.machine import Machine
from serving.models import catalog
from serving.models.catalog import Shape

PROCESSES_EACH_CORE = 8
LOAD_PROCESS_BYTES = 64 * 2**20  # beside the prompts; one with 4 users had 10 MiB of its own
PROMPT_TOKEN_BYTES = 6  # of text in a request's body
MEND = "run the lab itself with less by SET=, or run it on a larger machine"
INPUT_VALUE_BYTES = 2 * 3 * 2  # of timed attention: two kernels, each with q, k and v in BF16


def require_bounds(lab: Lab, machine: Machine, shape: Shape, starts_engines: bool) -> None:
    """Check what a lab asks for against what is here. Raises LabError."""
    cores, memory_bytes = len(os.sched_getaffinity(0)), available_bytes()
    for what, number, each_bytes in _processes(lab, starts_engines):
        most = max(1, min(PROCESSES_EACH_CORE * cores, memory_bytes // each_bytes))
        if number > most:
            raise LabError(
                f"{what} asks for {number} processes, each of about {each_bytes / 2**20:,.0f} MiB,"
                f" and this machine's {cores} cores and {memory_bytes / 2**30:.1f} GiB of available"
                f" memory have room for {most}: {MEND}"
            )
    timed_bytes = machine.memory_bytes if machine.kind == "gpu" else memory_bytes
    attention_bytes = INPUT_VALUE_BYTES * shape.hidden * sum(set(lab.attention_tokens))
    disk_bytes = lab.rounds * sum(_prompt_bytes(lab))
    for what, where, needed_bytes, free_bytes in (
        ("attention_tokens", "of memory", attention_bytes, timed_bytes // 2),
        ("requests", "on disk", disk_bytes, shutil.disk_usage(catalog.ROOT).free),
    ):
        if needed_bytes > free_bytes:
            raise LabError(
                f"{what} asks for up to {needed_bytes / 2**30:,.1f} GiB {where}, and this machine"
                f" has room for {free_bytes / 2**30:.1f} GiB: {MEND}"
            )


def _processes(lab: Lab, starts_engines: bool) -> Iterator[tuple[str, int, int]]:
    """Yield what is started: the setting that says how many, the number, and the bytes of each."""
    # every load process reads all requests of a trial, and takes its share
    each_bytes = LOAD_PROCESS_BYTES + max(_prompt_bytes(lab))
    yield "load_processes", lab.load_processes, each_bytes
    for variant in lab.variants if starts_engines else ():
        engine, flags = ENGINES[variant.engine], lab.flags_of(variant)
        yield f"the engine of {variant.name}", engine.servers(flags), engine.server_bytes


def _prompt_bytes(lab: Lab) -> list[int]:
    """Compute how long a file of each workload's requests is, at most."""
    longest = [lab.requests_of(w) * w.longest_tokens for w in lab.workloads]
    return [tokens * PROMPT_TOKEN_BYTES for tokens in longest]
