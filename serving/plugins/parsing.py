"""Have the installed vLLM's own parser read the arguments of its server; nothing is started.

    python -m serving.plugins.parsing < [[argument, ..], ..]

It prints a JSON object: `options`, all that the parser knows, and for each of the lists of
arguments in `errors` the parser's words, or null where it accepts them.

    python -m serving.plugins.parsing as-written < {"words": [argument, ..], "older": [option, ..]}

It prints what a line gives, of which nothing is known to be harmless yet: `given`, the texts of
each option by its name, or `error`, the parser's words. `older` are options that vLLM had before,
`--name V` where one takes a value.

This module imports vLLM, which takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any


def main() -> None:
    """Read the arguments from standard input, and print what the parser says of them."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # before 0.32
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    parser, asked = make_arg_parser(FlexibleArgumentParser()), json.load(sys.stdin)
    if sys.argv[1:] == ["as-written"]:
        plain = _without_types(parser, FlexibleArgumentParser(add_help=False), asked["older"])
        given, error = _read(plain.parse_args, asked["words"])
        print(json.dumps({"given": {} if error else vars(given), "error": error}))
        return
    errors = [_read(parser.parse_args, argv)[1] for argv in asked]
    print(json.dumps({"options": sorted(parser._option_string_actions), "errors": errors}))


def _read(parse: Callable[[Sequence[str]], Any], argv: Sequence[str]) -> tuple[Any, str | None]:
    """Parse these, and return what is given and the parser's words where it refuses them."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            return parse(argv), None
    except (SystemExit, ValueError) as error:
        lines = output.getvalue().strip().splitlines() or [str(error)]
        return None, lines[-1].split(" error: ")[-1]


def _without_types(parser: Any, plain: Any, older: Sequence[str]) -> Any:
    """Give a new parser the other's options, and leave their values the texts that they are.

    Types and actions of vLLM's own may import what a text names, and a file of settings is read.
    """
    plain._pull_args_from_config = lambda args: args
    for action in parser._actions:
        names = action.option_strings
        takes: dict[str, Any] = {"nargs": action.nargs, "const": action.const}
        if isinstance(action, argparse._HelpAction):
            continue
        if isinstance(action, argparse.BooleanOptionalAction):
            names = [n for n in names if n.replace("--no-", "--", 1) not in {*names} - {n}]
            takes = {"action": argparse.BooleanOptionalAction}
        elif action.nargs == 0:
            takes = {"action": "store_const", "const": action.const}
        elif isinstance(action, argparse._AppendAction):
            takes["action"] = "append"
        if names:
            takes["dest"] = action.dest
        plain.add_argument(*(names or [action.dest]), default=argparse.SUPPRESS, **takes)
    for option in older:
        name, *value = option.split()
        if name not in parser._option_string_actions:
            kind: dict[str, Any] = {} if value else {"action": "store_true"}
            plain.add_argument(name, default=argparse.SUPPRESS, **kind)
    return plain


if __name__ == "__main__":
    main()
