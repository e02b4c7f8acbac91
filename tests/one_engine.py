"""Starts an engine as a lab's run does, names the processes, and waits for the end of its input.

`python -m tests.with_vllm tests.one_engine MODEL_FOLDER LOG` has it forked; more flags may follow,
as a JSON object.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import psutil

from serving.engines.vllm import Vllm
from serving.hardware import machine
from serving.models import catalog
from tests import with_vllm

FLAGS = {"max-model-len": 256, "kv-cache-memory-bytes": 2**24, "enforce-eager": True}


def main(folder: str, log: str, more_flags: str = "{}") -> None:
    """Print what it serves, this process, the engine's guard and what is below that."""
    with_vllm.fork_engines()
    model = catalog.resolve(machine.cpu(), folder)
    flags = {**FLAGS, **Vllm.in_float32, **json.loads(more_flags)}
    engine = Vllm("one", model, flags, kind="cpu", log=Path(log))
    try:
        engine.wait()
        below = [p.pid for p in psutil.Process(engine.pid).children(recursive=True)]
        about = {"served": engine.served(), "run": os.getpid(), "guard": engine.pid, "below": below}
        print(json.dumps(about), flush=True)
        sys.stdin.read()
    finally:
        engine.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
