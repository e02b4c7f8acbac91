"""Starts the fake engine: `python -m tests.fake.engine --help`."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from serving.plugins import random_weights
from tests.fake.engine.alarm import Alarm
from tests.fake.engine.api import Api
from tests.fake.engine.connection import Connection
from tests.fake.engine.engine import Engine
from tests.fake.engine.options import parse
from tests.fake.engine.request_log import RequestLog


def fail(message: str) -> NoReturn:
    where = '  File "vllm/v1/engine/core.py", line 1, in run_engine_core\n    raise RuntimeError'
    print(f"Traceback (most recent call last):\n{where}\n{message}", file=sys.stderr)
    sys.exit(1)


def _config(model: str) -> dict[str, Any]:
    path = Path(model) / "config.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _quantization(model: str) -> str:
    """The method that the model's configuration names, as vLLM says it."""
    return str(_config(model).get("quantization_config", {}).get("quant_method"))


def _given(options: argparse.Namespace, argv: Sequence[str]) -> dict[str, object]:
    """What the command line gave: of an option its value here, of what is ignored its own."""
    given: dict[str, object] = {}
    for word, after in zip(argv, [*argv[1:], "--"], strict=True):
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            name = flag[2:].removeprefix("no-").replace("-", "_")
            given[name] = getattr(options, name, value or after)
    return given


async def serve(options: argparse.Namespace) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with open(options.log or os.devnull, "wb") as log:
        engine = Engine(options, Alarm(loop), RequestLog(log if options.log else None))
        make = partial(Connection, Api(engine).answer)
        server = await loop.create_server(make, "127.0.0.1", options.port, backlog=4096)
        port = server.sockets[0].getsockname()[1]
        backend = options.structured_outputs_config.get("backend", "auto")
        print("Initializing a V1 LLM engine (a fake) with config:"
              f" quantization={_quantization(options.model)},"
              f" structured_outputs_config=StructuredOutputsConfig(backend={backend!r}),"
              f" enforce_eager={options.enforce_eager}", file=sys.stderr)  # fmt: skip
        print("non-default args:", _given(options, sys.argv[1:]), file=sys.stderr)
        for architecture in _config(options.model).get("architectures", [])[:1]:
            print(f"Resolved architecture: {architecture}", file=sys.stderr)
        if options.load_format == "dummy":
            print(random_weights.line({16: 0.0}), file=sys.stderr)
            if "num_experts" in _config(options.model):
                engine.routing = os.environ[random_weights.ROUTING]
        print(f"Listening on http://127.0.0.1:{port}", file=sys.stderr, flush=True)
        gc.freeze()
        gc.disable()  # its pauses would show in the stamps; nothing here makes cycles that grow
        await stop.wait()
        server.close()
        engine.shut_down()


def main() -> None:
    options = parse(sys.argv[1:])
    if options.fail_start is not None:
        fail(options.fail_start)
    asyncio.run(serve(options))  # the standard loop, whose transports send within write()


if __name__ == "__main__":
    main()
