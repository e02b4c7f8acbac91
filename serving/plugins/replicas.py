"""Run several engines and the router before them as one program: where one ends, all end.

    python -m serving.plugins.replicas '{"replicas": [[argv], ..], "gpus": 0, "router": [argv]}'

Its guard (`serving/processes/process.py`) ends the others. On a CPU each replica gets its share of
the cores that `VLLM_CPU_OMP_THREADS_BIND` lists, elsewhere its share of the visible GPUs; where
these are fewer, replicas share one, each with the KV cache that its flags give it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

CORES, DEVICES = "VLLM_CPU_OMP_THREADS_BIND", "CUDA_VISIBLE_DEVICES"


def share(things: Sequence[str], replica: int, replicas: int) -> Sequence[str]:
    """Return a replica's share; one that others have too, where there are not enough."""
    return things[replica::replicas] or [things[replica % len(things)]]


def environment_of(
    replica: int, replicas: int, gpus: int, inherited: Mapping[str, str]
) -> dict[str, str]:
    """Return a replica's environment: all that is inherited, but its own cores and GPUs."""
    own = dict(inherited)
    if cores := own.get(CORES):
        own[CORES] = "|".join(share(cores.split("|"), replica, replicas))
    if gpus:
        visible = own.get(DEVICES) or ",".join(map(str, range(gpus)))
        own[DEVICES] = ",".join(share(visible.split(","), replica, replicas))
    return own


def main() -> None:
    """Start all, wait for the first that ends, and say which it was."""
    plan, started = json.loads(sys.argv[1]), {}
    argvs = plan["replicas"]
    for i, argv in enumerate(argvs):
        env = environment_of(i, len(argvs), plan["gpus"], os.environ)
        started[subprocess.Popen(argv, env=env).pid] = f"replica {i} of {len(argvs)}"
    started[subprocess.Popen(plan["router"]).pid] = "the router"
    pid, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    sys.exit(f"ReplicaError: {started[pid]} ended with exit code {code}")


if __name__ == "__main__":
    main()
