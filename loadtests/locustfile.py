"""Generates the load: Locust's master directs and records, its workers send and take times.

    locust -f loadtests/locustfile.py --headless --processes 1 -u 16 -r 16 --lab-exporter-port 9111

Trials come as JSON lines on the master's standard input (`TrialPlan`), events go out as JSON lines
on its standard output. Users are started once and wait between trials, so that a trial does not
start a process.

With several `--processes` each worker has its share of the users, of the requests and of the
schedule. They start together, and each counts time from its own start. If one dies, its share is
lost, which the trial's summary says; the next trial is shared among those that are left.

A worker does as little as it can while streams are open: what arrives is kept with its time, as it
is (`loadtests/connection.py`); a stream that has ended waits in a queue, of which one is parsed
every 2 ms, so that many that end together delay neither the next requests nor each other's first
tokens; connections are opened before the load; garbage is collected between trials. The master,
another process, writes the records and serves Prometheus.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
from typing import Any

import gevent
from locust import events, runners
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from loadtests import worker
from loadtests.exporter import Exporter
from loadtests.master import Director
from loadtests.worker import ChatUser

__all__ = ["ChatUser"]  # Locust takes the users it finds here
PR_SET_PDEATHSIG = 1  # linux/prctl.h
MASTER_PID = os.getpid()  # of the process that imports this file, and is forked for each worker


def end_with_master() -> None:
    """Have the kernel kill this worker when its master is gone, even where nobody could end it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != MASTER_PID:  # it was gone before
        os.kill(os.getpid(), signal.SIGKILL)


os.register_at_fork(after_in_child=end_with_master)

# Locust's worker measures its master's silence on the wall clock, which may jump. It needs no such
# limit: it ends with its master.
runners.MASTER_HEARTBEAT_TIMEOUT = math.inf


@events.init_command_line_parser.add_listener
def _options(parser: Any) -> None:
    group = parser.add_argument_group("inference-serving lab")
    group.add_argument("--lab-exporter-port", type=int, help="serve client metrics on this port")


@events.init.add_listener
def _begin(environment: Environment, **_: object) -> None:
    runner, options = environment.runner, environment.parsed_options
    assert options
    if isinstance(runner, WorkerRunner):
        with contextlib.suppress(PermissionError):
            os.nice(-10)  # its times must not wait for an engine that spins on its core
        worker.listen(runner)
    elif isinstance(runner, MasterRunner):
        os.nice(19)  # it shares a core with the worker, whose times must not wait
        exporter = Exporter()
        if options.lab_exporter_port:
            exporter.serve(options.lab_exporter_port)
        gevent.spawn(Director(runner, exporter).direct, options.num_users)
