"""What Python does first in every process of the tests: it makes the start of an engine cheaper.

A reader's own processes start without it; the code that they run is the same.

- Garbage is collected far more rarely. An engine's processes import millions of objects that stay,
  and by default the collector looks through all of them again and again: a fifth of the time that
  importing vLLM takes.
- vLLM's server forks its engine core, and that its worker. On a CPU vLLM spawns both, since a
  process that has begun threads of OpenMP must not be forked, and each imports vLLM anew: two
  thirds of the CPU time of a start. Neither parent has begun any.
- On a CPU the worker is a part of the engine core, unless a test asks for vLLM's default: apart,
  each of the two polls for the other while it waits. The process with the worker keeps to the
  worker's cores, with as many threads: vLLM hands both to OpenMP in the environment of a worker
  that it spawns, and a forked one has read its environment before.
- gevent, which Locust imports first, looks for plugins 25 times in all installed packages: half of
  what importing Locust takes. Here their metadata are read once.
- An engine with eager steps compiles nothing. vLLM still compiles a few small functions of its
  sampler where they are called first, which takes longer than all that they compute here.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Sequence
from itertools import count
from multiprocessing.context import BaseContext

SERVER, SEVERAL_SERVERS = "vllm.entrypoints.openai.api_server", "serving.plugins.api_servers"
WORKER_APART = "VLLM_ENABLE_V1_MULTIPROCESSING"
CORES = "VLLM_CPU_OMP_THREADS_BIND"
EAGER = "--enforce-eager"
NO_COMPILER = "TORCHDYNAMO_DISABLE"

_get_context = multiprocessing.get_context


def _forking(method: str | None = None) -> BaseContext:
    return _get_context("fork" if method == "spawn" else method)


def _keep_the_worker_to(cores: list[int]) -> None:
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    worker = 2 if os.environ.setdefault(WORKER_APART, "0") == "1" else 1
    generation = count(1)  # below the server, which each process counts on

    def bind() -> None:
        if next(generation) == worker:
            os.sched_setaffinity(0, cores)

    os.register_at_fork(after_in_child=bind)


def become_server(argv: Sequence[str]) -> None:
    """Prepare this process, which is to be vLLM's server with these arguments."""
    setattr(multiprocessing, "get_context", _forking)  # noqa: B010
    if EAGER in argv:
        os.environ[NO_COMPILER] = "1"
    first, *others = os.environ.get(CORES, "").split("|")  # the cores of several workers
    if others:
        os.environ["OMP_NUM_THREADS"] = str(len(first.split(",")))
    elif first:
        _keep_the_worker_to([int(core) for core in first.split(",")])


def _read_entry_points_once() -> None:
    from importlib import metadata

    setattr(metadata, "entry_points", metadata.entry_points().select)  # noqa: B010


def freeze() -> None:
    """Leave all that this process has made to its children without a look at it.

    A collection in a child would copy the pages of all that was imported.
    """
    gc.collect()
    gc.freeze()


gc.set_threshold(100_000, 50, 1000)
if {SERVER, SEVERAL_SERVERS} & {*sys.orig_argv}:
    become_server(sys.orig_argv)
if "locust" in sys.orig_argv[1:3]:  # python -m locust
    _read_entry_points_once()
