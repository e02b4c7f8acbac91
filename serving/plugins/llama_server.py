"""Start llama.cpp's server, from its own program or from a Python package:

    python -m serving.plugins.llama_server --model FILE --host 127.0.0.1 --port 8080 ..

Where `llama-server` is on PATH, it is started with these very arguments. Elsewhere the same server
is started from `xllamacpp`, which carries llama.cpp as a compiled package; it knows those arguments
that `Arguments` lists. In both, a key that the lab has made guards it (`serving/plugins/guard.py`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Sequence

from serving.plugins import guard

PROGRAM, PACKAGE = "llama-server", "xllamacpp"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments that the package is started with."""
    parser = argparse.ArgumentParser(
        prog="python -m serving.plugins.llama_server", allow_abbrev=False
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--parallel", type=int, default=1, help="requests that run at once")
    parser.add_argument("--ctx-size", type=int, default=0, help="tokens of all of them together")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--ubatch-size", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.environ.get("LLAMA_ARG_THREADS", -1))
    parser.add_argument("--metrics", action="store_true")
    parser.add_argument("--no-webui", action="store_true")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if program := shutil.which(PROGRAM):
        os.environ["LLAMA_API_KEY"] = os.environ.get(guard.KEY, "")
        os.execv(program, [program, *arguments])
    serve(parser().parse_args(arguments))


def serve(given: argparse.Namespace) -> None:
    """Serve from the package until a signal comes."""
    import xllamacpp

    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    params = xllamacpp.CommonParams()
    params.model.path = given.model
    params.model_alias = {given.alias}
    params.hostnames, params.port = [given.host], given.port
    params.n_parallel, params.n_ctx = given.parallel, given.ctx_size
    params.n_batch, params.n_ubatch = given.batch_size, given.ubatch_size
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given.threads
    params.endpoint_metrics, params.ui = given.metrics, not given.no_webui
    params.api_keys = [key] if (key := os.environ.get(guard.KEY)) else []
    server = xllamacpp.Server(params)
    print(f"serving at {server.listening_address}", flush=True)
    signal.sigwait((signal.SIGTERM, signal.SIGINT))
    os._exit(0)


if __name__ == "__main__":
    main()
