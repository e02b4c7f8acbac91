"""Send load from this machine for a run that goes on at another one."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import zmq

from labs.harness.spec import LabError
from loadtests import load_workers
from loadtests.event_lines import events_of
from loadtests.generator import worker_argv
from serving.processes.process import Process

REACH_TIMEOUT_S = 10.0


def send_load(master: str, key: str, report: Callable[[str], None]) -> None:
    """Be one load process of the run whose master listens at `host:port`, until that ends.

    `report` is called with what a reader should see. Raises LabError where nothing listens there,
    the key is another, or the run was lost sight of.
    """
    try:
        host, port = load_workers.address_of(master)
        load_workers.require_key(key)
    except ValueError as error:
        raise LabError(str(error)) from error
    try:
        socket.create_connection((host, port), REACH_TIMEOUT_S).close()
        taken_in = load_workers.is_taken_in(host, port, key, REACH_TIMEOUT_S)
    except (OSError, zmq.ZMQError) as error:
        raise LabError(
            f"nothing answers at {master} ({error.strerror or error}): start the run first, and"
            " give MASTER= the address that it shows"
        ) from error
    if not taken_in:
        raise LabError(
            f"what listens at {master} is no run that takes this KEY: give both as that run shows"
            " them"
        )
    with tempfile.TemporaryDirectory(prefix="labs-load-worker-") as folder:
        log = Path(folder) / "locust.log"
        env = {load_workers.KEY: key}
        with Process(
            "load-worker", worker_argv(host, port), log=log, env=env, talk=True
        ) as process:
            joined = False
            for event in events_of(process.stdout):
                if event["event"] == "joined":
                    joined = True
                    report(f"Joined the run at {master}. Ctrl-C leaves it.")
                elif event["event"] == "refused":
                    raise LabError(event["reason"])
                elif event["event"] == "sent":
                    report(f"Requests sent in this trial: {event['requests']}")
            code = process.wait()
            if not joined:
                raise LabError(
                    f"the run at {master} did not take this load worker in: it may have ended"
                    " meanwhile. Start it again, and then this load worker"
                    f"\n{process.tail()}".rstrip()
                )
            if code:
                raise LabError(
                    f"this load worker ended with exit code {code}: start the run again with"
                    f" RESUME=1, and then its load workers\n{process.tail()}".rstrip()
                )
