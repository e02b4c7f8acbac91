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
from serving.inside import guard
from serving.processes.ports import free_port
from serving.processes.process import Process


@dataclass(frozen=True)
class RunningLocust:
    """Our Locust, ready to play trials."""

    generator: generator.Generator
    child: Process
    exporter_port: int

    def cpu_s(self) -> tuple[float, float]:
        """Return the CPU seconds so far of Locust's master, which records, and of all of Locust."""
        (master,) = psutil.Process(self.child.pid).children()
        family = (master, *master.children(recursive=True))
        used = [sum(p.cpu_times()[:2]) for p in family]
        return used[0], sum(used)

    def held_bytes(self) -> tuple[int, int]:
        """Return the memory that Locust's master holds, which records, and that the others hold."""
        (master,) = psutil.Process(self.child.pid).children()
        senders = master.children(recursive=True)
        return master.memory_info().rss, sum(p.memory_info().rss for p in senders)


@contextlib.contextmanager
def locust(
    users: int, work: Path, locustfile: Path = generator.LOCUSTFILE, processes: int = 1
) -> Iterator[RunningLocust]:
    """Start our Locust as a run starts it, with its exporter; it ends with the block.

    A locustfile in another `loadtests/` imports the modules beside it, not ours.
    """
    argv = generator.argv(users, exporter_port := free_port(), free_port(), processes)
    argv[argv.index(str(generator.LOCUSTFILE))] = str(locustfile)
    env = {guard.KEY: guard.key()}
    if locustfile.parent.name == generator.LOCUSTFILE.parent.name:
        argv.insert(1, "-P")  # the current folder, which holds our own, is not searched first
        env["PYTHONPATH"] = str(locustfile.resolve().parents[1])
    log, cores = work / f"locust-{users}.log", machines.split_cores()[1]
    with Process("locust", argv, log=log, env=env, cores=cores, talk=True) as child:
        yield RunningLocust(generator.Generator(child), child, exporter_port)


def trial(
    url: str, users: int, requests_file: Path, warmup_s: float, window_s: float, records_file: Path
) -> plan.TrialPlan:
    """Plan a trial of closed-loop users, in a lab called `bench`."""
    return plan.TrialPlan(
        url=url, arrival=Concurrent(users=users), requests=requests_file, records=records_file,
        warmup_s=warmup_s, window_s=window_s, timeout_s=60, seed=0, lab="bench", variant="bench",
        run_id="bench", workload="bench",
    )  # fmt: skip
