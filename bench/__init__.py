"""What the lab's own instruments cost: figures beside their aims, from one run on this machine.

    python -m bench --help

Nothing here fails because of a time: a bench shows where the lab stands, `make test` says whether
it is right. What a part found goes to `results/<machine>/bench.json` as soon as it is there;
README.md shows it.

A module for each part, with a function `measure` that prints what it finds and returns it:

    streams     what the load generator adds to TTFT and gaps, and the CPU that it costs
    engine      vLLM's throughput under our load generator and under `vllm bench serve`
    neighbour   an engine's throughput beside another that is loaded and idle
    recording   the share of the generator's CPU that goes into recording for Prometheus
    overhead    the lab's own share of a run
    aa          false alarms of a lab that compares its baseline with itself

and what several of them use:

    truth       the server that records what it handed to the socket, and when
    trials      one trial against that server, and what the client's records say beyond it
    clients     the same requests by our load generator and by vLLM's tool
    load        our load generator, as a run starts it
    console     what is printed
    clock       how long it will still take
"""

from __future__ import annotations


class BenchError(Exception):
    """A part could not be measured."""
