"""Start `transformers serve` behind the lab's guard.

    python -m serving.plugins.transformers_server --model FOLDER --host 127.0.0.1 --port 8000 ..

The server that transformers brings has no key, loads any model that a request names, and would
answer every program of the machine. Here it is the same server with `serving/plugins/guard.py`
before it, pinned to one model. All other arguments are its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from serving.plugins.guard import Guard


def guarded(build: Callable[..., Any]) -> Callable[..., Any]:
    """Have the function that builds its application put the guard before it."""

    def build_guarded(*arguments: Any, **named: Any) -> Any:
        application = build(*arguments, **named)
        application.add_middleware(Guard)
        return application

    return build_guarded


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m serving.plugins.transformers_server", allow_abbrev=False
    )
    parser.add_argument("--model", required=True)
    given, rest = parser.parse_known_args(argv)
    from transformers.cli import transformers
    from transformers.cli.serving import server

    server.build_server = guarded(server.build_server)
    sys.argv = ["transformers", "serve", given.model, *rest]
    transformers.app()


if __name__ == "__main__":
    main()
