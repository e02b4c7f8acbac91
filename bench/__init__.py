"""Measure how far the lab's own instruments can be trusted: figures beside their aims.

    python -m bench --help

No time makes a bench fail: it shows how good the instruments are, and `make test` whether they are
right. A part's figures go to `results/<machine>/bench.json` as soon as they are measured, and are
shown as in results/instruments.md.

Each part is a module, with a function `measure` that returns its figures:

    streams     what the load generator adds to TTFT and gaps, and the CPU that it costs
    engine      vLLM's throughput under our load generator and under `vllm bench serve`

They use:

    truth       the server that records what it handed to the socket, and when
    trials      one trial against that server, and how the client's records differ from its log
    load        our load generator, as a run starts it
"""

from __future__ import annotations

import sys


class BenchError(Exception):
    """A part could not be measured; the message says why."""


def tell(text: str) -> None:
    """Say what is being measured, on standard error."""
    print(text, file=sys.stderr, flush=True)
