"""Look for what the lab reads of vLLM by name: run in the environment, as on one GPU.

    python -m tests.rehearsal.names CHECKS.jsonl MODELS

The metrics are those that vLLM registers, the log's lines are those that it writes, of a small
engine with adapters and a draft by n-grams, whose configuration is made and which never starts.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import prometheus_client
import vllm
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.cli_args import make_arg_parser
from vllm.entrypoints.serve.utils.api_utils import log_non_default_args
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.metrics.loggers import PrometheusStatLogger

from serving import metrics
from serving.engines import vllm as engine
from serving.engines.base import EngineError
from serving.engines.flags import Flags
from serving.engines.vllm import Vllm
from serving.hardware import machine as machines
from serving.models import catalog
from serving.plugins import random_weights
from tests.rehearsal import starts
from tests.rehearsal.checks import Check, last_line, write

SOURCES = Path(vllm.__file__).parent
FLAGS: Flags = {
    "max-model-len": 1024, "enable-lora": True, "enforce-eager": True, "watermark": 0.05,
    "kv-offloading-size": 1.0,
    "speculative-config": {
        "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4,
    },
}  # fmt: skip
ROUTES = (  # of the server, in its sources
    *("/health", "/metrics", "/v1/models", "/v1/chat/completions", "/reset_prefix_cache"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
)
LINES = ("Initializing a V1 LLM engine", "non-default args: ")


def sources() -> str:
    """Read all of vLLM's Python sources as one text."""
    return "\n".join(path.read_text(errors="replace") for path in SOURCES.rglob("*.py"))


def known(what: str, name: str, is_known: bool, otherwise: str) -> Check:
    return Check(what=what, name=name, error="" if is_known else otherwise)


def checks(home: Path) -> Iterator[Check]:
    text = sources()
    yield from _in_sources(text)
    arguments, config = _small_engine()
    yield from _metrics(config)
    yield from _log(arguments, config)
    yield from _variables(home)
    yield from _hooks()


def _in_sources(text: str) -> Iterator[Check]:
    for route in ROUTES:
        yield known("routes", route, f'"{route}"' in text, "not in vLLM's sources")
    for line in LINES:
        yield known("log lines", line, line in text, "not in vLLM's sources")


def _small_engine() -> tuple[Any, Any]:
    """Return the arguments of an engine and the configuration that vLLM makes of them."""
    argv = ["--model", str(catalog.bundled()), *Vllm.flag_argv(FLAGS)]
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(argv)
    made = AsyncEngineArgs.from_cli_args(arguments)
    return arguments, made.create_engine_config(UsageContext.OPENAI_API_SERVER)


def _metrics(config: Any) -> Iterator[Check]:
    logger = PrometheusStatLogger(config, [0])
    logger.log_engine_initialized()
    exposed = prometheus_client.generate_latest().decode()
    names = set(re.findall(r"^# TYPE (\S+)", exposed, re.MULTILINE))
    with_a_setting = (*metrics.SPECULATION, metrics.LORA, metrics.KV_LOADED_BYTES)
    for name in (*engine.METRICS, *with_a_setting):
        yield known("metrics", name, name in names, "not registered")


def _log(arguments: Any, config: Any) -> Iterator[Check]:
    """Read the lines that the server and the engine core log at their start, as the lab does."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logging.getLogger("vllm").addHandler(Ear(logging.INFO))
    logging.getLogger("vllm").setLevel(logging.INFO)
    logging.getLogger("vllm.entrypoints").setLevel(logging.INFO)
    log_non_default_args(arguments)
    given = next((line for line in heard if "non-default args: " in line), "")
    settings = engine.resolved(f"{config}\n{given}")
    for name in ("enforce_eager", "compilation_mode", "cudagraph_mode",
                 "structured_outputs_backend", "quantization", "watermark"):  # fmt: skip
        yield known("log lines", name, name in settings, "not in the configuration's line")
    read = engine.arguments(given)
    for name, value in {"max_model_len": "1024", "enable_lora": "True"}.items():
        otherwise = f"read as {read.get(name)}"
        yield known("log lines", f"argument {name}", read.get(name) == value, otherwise)


def _variables(home: Path) -> Iterator[Check]:
    """Look up the environment variables that the lab sets for any engine of any lab."""
    every = starts.starts(machines.detect(), home)
    names = {n for s in every if isinstance(s, starts.Start) for n, _ in s.variables}
    for name in sorted(n for n in names if n.startswith("VLLM_")):
        yield known("variables", name, name in envs.environment_variables, "not known to vLLM")


def _hooks() -> Iterator[Check]:
    """Import what vLLM is told to import, and have its parser judge flags in its own process."""
    module, _, name = random_weights.EXTENSION.rpartition(".")
    several = "vllm.entrypoints.cli.serve:ServeSubcommand"
    for what in (f"{module}:{name}", engine.GUARD.replace(".Guard", ":Guard"), several):
        path, _, attribute = what.partition(":")
        try:
            getattr(importlib.import_module(path), attribute)
            error = ""
        except Exception as reason:  # whatever is raised is what the check is for
            error = f"{type(reason).__name__}: {last_line(str(reason))}"
        yield Check(what="hooks", name=what, error=error)
    plugins = {point.name for point in metadata.entry_points(group="vllm.general_plugins")}
    for plugin in ("end_with_parent", "lm_format_enforcer"):
        name = f"vllm.general_plugins: {plugin}"
        yield known("hooks", name, plugin in plugins, "vLLM would not find it")
    try:
        Vllm.check_flags([FLAGS])
        error = ""
    except EngineError as reason:
        error = last_line(str(reason))
    yield Check(what="hooks", name="flags are checked before a start", error=error)


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(engine.PLUGINS), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    write(Path(sys.argv[1]), checks(Path(sys.argv[2])))
    os._exit(0)  # vLLM's threads would wait
