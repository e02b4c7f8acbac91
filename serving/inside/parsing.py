"""Have the installed vLLM's own parser read the arguments of its server; nothing is started.

    python -m serving.inside.parsing < [[argument, ..], ..]

It prints a JSON object: `options`, all that the parser knows, and for each of the lists of
arguments in `errors` the parser's words, or null where it accepts them. This module imports vLLM,
which takes seconds.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys


def main() -> None:
    """Read the arguments from standard input, and print what the parser says of them."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # before 0.32
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    parser = make_arg_parser(FlexibleArgumentParser())
    errors: list[str | None] = []
    for argv in json.load(sys.stdin):
        output = io.StringIO()
        try:
            with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
                parser.parse_args(argv)
            errors.append(None)
        except (SystemExit, ValueError) as error:
            lines = output.getvalue().strip().splitlines() or [str(error)]
            errors.append(lines[-1].split(" error: ")[-1])
    print(json.dumps({"options": sorted(parser._option_string_actions), "errors": errors}))


if __name__ == "__main__":
    main()
