"""Measure what the lab's own instruments cost: figures beside their aims, on this machine.

    python -m bench --help

No time makes a bench fail: it shows how good the instruments are, and `make test` whether they are
right. A part's figures go to `results/<machine>/bench.json` as soon as they are measured, and
results/README.md shows them.

Each part is a module, with a function `measure` that prints its figures and returns them:

    streams     what the load generator adds to TTFT and gaps, and the CPU that it costs
    engine      vLLM's throughput under our load generator and under `vllm bench serve`
    neighbour   an engine's throughput beside another that is loaded and idle
    recording   the share of the generator's CPU that goes into recording for Prometheus
    overhead    the lab's own share of a run
    aa          false alarms of a lab that compares its baseline with itself
    fleet       how the time to play a fleet in virtual time grows, on one core

Several of them use:

    truth       the server that records what it handed to the socket, and when
    trials      one trial against that server, and how the client's records differ from its log
    clients     the same requests by our load generator and by vLLM's tool
    load        our load generator, as a run starts it
    console     tables, and figures beside their aims
    clock       the progress, and an estimate of the time left
"""

from __future__ import annotations


class BenchError(Exception):
    """A part could not be measured; the message says why."""
