"""The load generator, as a run starts it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from loadtests import generator, plan
from loadtests.arrivals import Concurrent
from serving.hardware import machine as machines
from serving.plugins import guard
from serving.processes.ports import free_port
from serving.processes.process import Process


@dataclass(frozen=True)
class RunningLocust:
    """Our Locust, ready to play trials."""

    generator: generator.Generator
    child: Process

    def cpu_s(self) -> float:
        """Return the CPU seconds so far of all of Locust, its recording master included."""
        (master,) = psutil.Process(self.child.pid).children()
        family = (master, *master.children(recursive=True))
        return sum(sum(p.cpu_times()[:2]) for p in family)


@contextlib.contextmanager
def locust(users: int, work: Path, processes: int = 1) -> Iterator[RunningLocust]:
    """Start our Locust as a run starts it, with its exporter; it ends with the block."""
    argv = generator.argv(users, free_port(), free_port(), processes)
    env = {guard.KEY: guard.key()}
    log, cores = work / f"locust-{users}.log", machines.split_cores()[1]
    with Process("locust", argv, log=log, env=env, cores=cores, talk=True) as child:
        yield RunningLocust(generator.Generator(child), child)


def trial(
    url: str, users: int, requests_file: Path, warmup_s: float, window_s: float, records_file: Path
) -> plan.TrialPlan:
    """Plan a trial of closed-loop users, in a lab called `bench`."""
    return plan.TrialPlan(
        url=url,
        arrival=Concurrent(users=users),
        requests=requests_file,
        records=records_file,
        warmup_s=warmup_s,
        window_s=window_s,
        timeout_s=60,
        seed=0,
        lab="bench",
        variant="bench",
        run_id="bench",
        workload="bench",
    )
