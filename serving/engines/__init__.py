"""The engines that the lab can start, by the name a variant gives: one module and one line each.

`base.py` says what the lab needs of an engine. `endpoint.py` is a server that somebody else has
started.
"""

from __future__ import annotations

import importlib

from serving.engines.base import Engine
from serving.engines.flags import Flags
from serving.engines.routed import Routed
from serving.engines.vllm_flags import VllmFlags


def _engine(module: str) -> tuple[str, type[Engine]]:
    """Import the `ENGINE` that `serving/engines/<module>.py` defines."""
    engine = importlib.import_module(f"serving.engines.{module}").ENGINE
    if not (isinstance(engine, type) and issubclass(engine, Engine)):
        raise TypeError(f"serving.engines.{module}.ENGINE is no Engine")
    return module.replace("_", "-"), engine


DEFAULT_ENGINE = "vllm"
ENGINES: dict[str, type[Engine]] = dict(
    (
        _engine("vllm"),
        _engine("transformers"),
        _engine("llama_cpp"),
    )
)


def engine_of(name: str, flags: Flags) -> type[Engine]:
    """Return the engine of a name, or with a router's flags what stands before several of it."""
    routed = name == DEFAULT_ENGINE and VllmFlags(flags).router
    return Routed if routed else ENGINES[name]
