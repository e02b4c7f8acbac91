"""What Python does first in every process of the tests: it makes the start of an engine cheaper.

A reader's own processes start without it; the code that they run is the same.

- Garbage is collected far more rarely. An engine's processes import millions of objects that stay,
  and by default the collector looks through all of them again and again: a fifth of the time that
  importing vLLM takes.
- vLLM's server forks its engine core, and that its worker. On a CPU vLLM spawns both, since a
  process that has begun threads of OpenMP must not be forked, and each imports vLLM anew: two
  thirds of the CPU time of a start. Neither parent has begun any.
"""

from __future__ import annotations

import gc
import multiprocessing
import sys
from multiprocessing.context import BaseContext

SERVER = "vllm.entrypoints.openai.api_server"

_get_context = multiprocessing.get_context


def _forking(method: str | None = None) -> BaseContext:
    return _get_context("fork" if method == "spawn" else method)


gc.set_threshold(100_000, 50, 1000)
if SERVER in sys.orig_argv:
    setattr(multiprocessing, "get_context", _forking)  # noqa: B010
