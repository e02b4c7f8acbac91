"""Have vLLM make the configuration of every engine: run in the environment, as on one GPU.

python -m tests.rehearsal.configure CHECKS.jsonl MODELS
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.selector import get_attn_backend

from serving.engines.vllm import SINCE
from serving.hardware import machine as machines
from tests.rehearsal.checks import Check, last_line, write
from tests.rehearsal.starts import Refused, starts

PARSER = make_arg_parser(FlexibleArgumentParser())
OPTIONS = frozenset(PARSER._option_string_actions)
COMPILED = "attends by FlashInfer, which compiles kernels as it starts and needs a CUDA toolkit"
LIMITS_QUEUES = all(f"--{flag}" in OPTIONS for flag in SINCE)


@dataclass(frozen=True)
class Outcome:
    """What came of an engine's arguments: what went wrong, and what a reader should know."""

    error: str = ""
    note: str = ""


@functools.cache
def outcome(argv: tuple[str, ...], variables: tuple[tuple[str, str], ...]) -> Outcome:
    """Make the configuration that the server would begin with, and choose how it attends."""
    try:
        with environment(variables):
            backend = attention(engine_config(argv))
    except Exception as error:  # whatever vLLM raises is what the check is for
        return Outcome(f"{type(error).__name__}: {last_line(str(error))}")
    return Outcome(note=COMPILED if backend == "FLASHINFER" else "")


@contextlib.contextmanager
def environment(variables: Iterable[tuple[str, str]]) -> Iterator[None]:
    """Have an engine's environment variables for a while, and then those of before."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def engine_config(argv: Sequence[str]) -> Any:
    """Make vLLM's configuration of a server's arguments.

    Raises ValueError with the parser's last line, and whatever vLLM raises.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            arguments = PARSER.parse_args(list(argv))
            validate_parsed_serve_args(arguments)
    except SystemExit as ended:  # of the parser
        raise ValueError(last_line(said.getvalue())) from ended
    engine = AsyncEngineArgs.from_cli_args(arguments)
    return engine.create_engine_config(UsageContext.OPENAI_API_SERVER)


def attention(config: Any) -> str:
    """Return the backend that each layer of this engine would choose for its attention."""
    model = config.model_config
    with set_current_vllm_config(config):
        backend = get_attn_backend(
            model.get_head_size(),
            model.dtype,
            config.cache_config.cache_dtype,
            num_heads=model.get_num_attention_heads(config.parallel_config),
            has_sliding_window=model.get_sliding_window() is not None,
        )
    return str(backend.get_name())


def checks(home: Path) -> Iterator[Check]:
    """Make the configuration of every engine."""
    for start in starts(machines.detect(), home, LIMITS_QUEUES):
        what = f"engines, {start.weights} weights{', QUICK=1' if start.quick else ''}"
        if isinstance(start, Refused):
            error = last_line(start.error)
            yield Check(what=what, name=start.lab, error=error, applies=start.applies)
            continue
        name = f"{start.lab}: {start.variant}"
        made = outcome(start.argv, start.variables)
        yield Check(what=what, name=name, error=made.error, note=made.note)


if __name__ == "__main__":
    write(Path(sys.argv[1]), checks(Path(sys.argv[2])))
    os._exit(0)  # vLLM's threads would wait
