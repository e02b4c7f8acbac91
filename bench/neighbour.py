"""An engine's throughput beside another that is loaded and idle, and beside a suspended one."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path

from bench.clients import ENGINE_FLAGS, USERS, rate, send_by_locust, write_work
from bench.clock import Clock
from bench.console import aim, within
from bench.load import locust
from labs.harness.judging.judge import contrast
from labs.harness.telling import instruments
from serving.engines.vllm import Vllm
from serving.hardware import machine as machines
from serving.weights import models


def measure(clock: Clock, work: Path, pairs: int) -> instruments.Neighbour:
    """Load one engine, in turn beside an idle one and beside the same one suspended."""
    machine = machines.detect()
    model = models.resolve(machine)
    write_work(work, model)
    with contextlib.ExitStack() as exits:
        engines = []
        for name in ("loaded", "idle"):
            started = Vllm(name, model, ENGINE_FLAGS, kind=machine.kind, log=work / f"{name}.log")
            exits.callback(started.stop)
            engines.append(started)
        load = exits.enter_context(locust(USERS, work / "locust"))
        clock.tell("starting two engines", 0)
        for started in engines:
            started.wait()
        loaded, other = engines
        play = partial(send_by_locust, load, loaded.url, work / "requests.jsonl")
        clock.tell("warming up", 0)
        play(work / "warm-up")
        rates: dict[str, dict[int, float]] = {"idle": {}, "held": {}}
        for pair in range(pairs):
            for arm in list(rates)[:: -1 if pair % 2 else 1]:
                clock.tell(f"{arm}, {pair + 1} of {pairs}", (pair + 0.5) / (pairs + 1))
                (other.suspend if arm == "held" else other.resume)()
                rates[arm][pair] = rate(play(work / f"{pair}-{arm}"))
    slowed = contrast(rates["idle"], rates["held"], paired=True)
    assert slowed
    ratio = slowed.ratio
    wide = ratio.low is not None and ratio.low < 0.97 < ratio.value
    doubt = "the interval includes the bound: try more --pairs" if wide else ""
    figure = f"throughput beside an idle engine / beside a suspended one{within(ratio)}"
    aim(figure, ratio.value, 0.97, at_least=True, doubt=doubt)
    return instruments.Neighbour(throughput=ratio)
