"""The `labs` command with the engine on the clients' cores, and the clients on the engine's.

On a machine of two cores every lab serves on the first. Of two labs that run beside each other one
is run by this module: their engines have a core each, and neither waits while the other core is
idle. Where the parts differ in size, as on larger machines, nothing is swapped. Numbers of the
product's own are as small as `tests/small.py` makes them.
"""

from __future__ import annotations

from labs.harness.cli.cli import app
from serving.hardware import machine
from tests.small import make_small

Cores = tuple[int, ...]


def _swapped(kind: str = "cpu") -> tuple[Cores, Cores]:
    engine, clients = split_cores(kind)
    return (clients, engine) if len(engine) == len(clients) else (engine, clients)


split_cores = machine.split_cores
machine.split_cores = _swapped

if __name__ == "__main__":
    make_small()
    app()
