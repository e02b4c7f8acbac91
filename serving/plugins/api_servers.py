"""Start vLLM with several API servers in front of its engine, as `vllm serve` does.

vLLM's module `vllm.entrypoints.openai.api_server`, which the labs start otherwise, reads
`--api-server-count` and starts one server whatever it says. The command `vllm` heeds it, but ends
at once in the CPU build, which is not installed under the name that it looks for. So this calls
what that command calls.

This module imports vLLM, so it runs in the engine's environment only. Tested with vLLM 0.32 on a
CPU; with 0.26 it was tried up to where several servers are started.
"""

from __future__ import annotations


def main() -> None:
    """Serve with the arguments of `vllm serve`; the model is named by `--model`."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    except ImportError:  # before 0.32
        from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
    cli_env_setup()
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args()
    validate_parsed_serve_args(arguments)
    ServeSubcommand.cmd(arguments)


if __name__ == "__main__":  # each API server that it spawns imports this module, too
    main()
