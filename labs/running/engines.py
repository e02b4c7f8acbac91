"""The engines of a run: which of them stay loaded together, how they start and how they stop."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from dashboards.prometheus import Prometheus
from labs.lab import Variant
from labs.running.progress import ProgressDisplay
from labs.running.resolve import Setup
from serving.engines import ENGINES
from serving.engines.base import Engine, Server, with_places

Groups = list[list[Variant]]  # variants that stay loaded together


def resident_groups(setup: Setup) -> Groups:
    """Return all variants as one group where host memory admits it, else a group for each.

    A GPU engine takes its share of the device for itself, so there they take turns, in an order
    that is drawn: none is always measured first.
    """
    variants = list(setup.lab.variants)
    if len(variants) == 1 or setup.endpoint:
        return [variants]
    if setup.machine.kind == "cpu":
        need = [
            ENGINES[v.engine].host_memory_bytes(setup.lab.flags_of(v), setup.model.shape)
            for v in variants
        ]
        known = [n for n in need if n is not None]
        if known == need and sum(known) < 0.7 * psutil.virtual_memory().available:
            return [variants]
    turns = random.Random(f"{setup.lab.seed}/turns")
    return [[v] for v in turns.sample(variants, len(variants))]


def order_of_engines(groups: Groups, repeats: int) -> list[tuple[list[Variant], range]]:
    """Return which engines are loaded one after another, and the repeats that they then play.

    The order is A B C and then C B A, so that drift of the machine separates the repeats of one
    variant, too, and widens the intervals. With fewer than three repeats it is A B C alone.
    """
    if len(groups) == 1 or repeats < 3:
        return [(group, range(1, repeats + 1)) for group in groups]
    there, back = range(1, repeats // 2 + 1), range(repeats // 2 + 1, repeats + 1)
    return [*((group, there) for group in groups), *((group, back) for group in groups[::-1])]


class Engines:
    """Starts and stops the engines of a run, and holds those that serve now."""

    def __init__(
        self,
        setup: Setup,
        logs: Path,
        prometheus: Prometheus,
        labels: Mapping[str, str],
        progress: ProgressDisplay,
    ) -> None:
        self.start_s = 0.0  # spent on waiting for engines so far
        self._setup, self._logs, self._progress = setup, logs, progress
        self._prometheus, self._labels = prometheus, labels
        self._serving: dict[str, Server] = {}

    def serves(self, variant: Variant) -> bool:
        return variant.name in self._serving

    def load(self, group: Sequence[Variant]) -> bool:
        """Have the engines of these variants serve, and no others. Raises EngineError.

        Returns whether any engine had to be started.
        """
        if self._serving.keys() == {v.name for v in group}:
            return False
        self.unload()
        starting = [(v, self._start(v)) for v in group]  # at the same time: their imports take long
        for variant, engine in starting:
            self._wait(variant, engine)
        return True

    def unload(self) -> None:
        for engine in self._serving.values():
            engine.stop()
        self._serving.clear()
        self._prometheus.forget("engine")  # the next engine may get the port of one of these

    def alive(self, variant: Variant) -> Server | None:
        """Return the engine of a variant; None where it has died or was not started."""
        engine = self._serving.get(variant.name)
        return None if engine is None or engine.died() else engine

    def serving(self, variant: Variant) -> Server:
        """Return the engine of a variant; start a new one where it died in an earlier trial.

        Raises EngineError.
        """
        if engine := self.alive(variant):
            return engine
        if dead := self._serving.get(variant.name):
            dead.stop()
        engine = self._start(variant)
        self._wait(variant, engine)
        return engine

    def _start(self, variant: Variant) -> Server:
        setup = self._setup
        if setup.endpoint:
            self._serving[variant.name] = setup.endpoint
            return setup.endpoint
        engine = ENGINES[variant.engine](
            variant.name,
            setup.weights.get(variant.name, setup.model),
            with_places(setup.lab.flags_of(variant), setup.places),
            kind=setup.machine.kind,
            log=self._logs / f"engine-{variant.name}.log",
            command=setup.engine_command,
            beside=setup.lab.all_flags,
        )
        self._serving[variant.name] = engine
        return engine

    def _wait(self, variant: Variant, engine: Server) -> None:
        """Wait until it serves, and have Prometheus scrape it. Raises EngineError."""
        if not isinstance(engine, Engine):
            return
        began = time.monotonic()
        # on a GPU it compiles and captures, for minutes the first time
        on_cpu = self._setup.machine.kind == "cpu"
        about = f" of about {engine.start_s:.0f}" if on_cpu and engine.start_s else ""
        starting = f"starting {engine.title} ({variant.name})"
        engine.wait(lambda s: self._progress.waiting(f"{starting}: {s:.0f} s{about}"))
        took_s = time.monotonic() - began
        self.start_s += took_s
        serves = f"{engine.title} ({variant.name}) serves at {engine.url}"
        self._progress.message(f"{serves} after {took_s:.0f} s")
        self._prometheus.scrape("engine", engine.url, {**self._labels, "variant": variant.name})
