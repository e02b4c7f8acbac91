"""The engines of a run: which of them stay loaded together, how they start and how they stop."""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from dashboards.prometheus import Prometheus
from labs.harness.plan.progress import ProgressDisplay
from labs.harness.plan.resolve import Setup
from labs.harness.spec.lab import Variant
from serving.engines import ENGINES, engine_of
from serving.engines.base import Engine, Server
from serving.engines.flags import with_places
from serving.hardware import machine as machines
from serving.hardware.host_memory import available_bytes

Groups = list[list[Variant]]  # variants that stay loaded together
Trip = list[tuple[list[Variant], list[int]]]  # groups one after another, the repeats of each


def resident_groups(setup: Setup, took_turns: bool | None = None) -> Groups:
    """Return all variants as one group where a CPU's memory admits it, else a group for each.

    On a GPU engines take turns. A run that is resumed goes on as it began, whatever memory is free
    now: `took_turns` says how that was.
    """
    variants = list(setup.lab.variants)
    if len(variants) == 1 or setup.endpoint:
        return [variants]
    together = _fit_together(setup) if took_turns is None else not took_turns
    return [variants] if together else groups_in_turn(setup)


def groups_in_turn(setup: Setup) -> Groups:
    """Return a group for each variant, in an order that is drawn: none is always measured first.

    Where loads are multiples of the first variant's capacity, that one begins.
    """
    variants = list(setup.lab.variants)
    turns = random.Random(f"{setup.lab.seed}/turns").sample(variants, len(variants))
    if setup.lab.finds_capacity:
        turns.sort(key=lambda variant: variant != variants[0])
    return [[v] for v in turns]


def _fit_together(setup: Setup) -> bool:
    """Tell whether the engines of all variants fit into a CPU's memory at the same time."""
    if setup.machine.kind == "gpu":
        return False
    need = [
        ENGINES[v.engine].host_memory_bytes(setup.lab.flags_of(v), setup.model.shape)
        for v in setup.lab.variants
    ]
    known = [n for n in need if n is not None]
    return known == need and sum(known) < 0.7 * available_bytes()


def order_of_engines(groups: Groups, repeats: Sequence[int], starts: int) -> list[Trip]:
    """Share out the repeats among trips through all engines.

    Engines that stay loaded together play one repeat a trip. Others are started anew in every trip,
    `starts` times, and the order is A B C, C B A, A B C: what the machine drifts meanwhile, and
    what a start changes, separates the repeats of one variant, too, and widens the intervals.
    """
    if len(groups) == 1:
        return [[(groups[0], [repeat])] for repeat in repeats]
    shares = np.array_split(repeats, min(starts, len(repeats)))
    return [
        [(group, share.tolist()) for group in groups[:: -1 if i % 2 else 1]]
        for i, share in enumerate(shares)
    ]


class Engines:
    """Starts and stops the engines of a run, and holds those that serve now."""

    def __init__(
        self,
        setup: Setup,
        logs: Path,
        prometheus: Prometheus,
        labels: Mapping[str, str],
        progress: ProgressDisplay,
        on_file: Mapping[str, int] | None = None,
    ) -> None:
        """Take the instruments of a run, and each variant's starts in earlier sittings."""
        self.start_s = 0.0  # spent on waiting for engines so far
        self.started = 0  # engines so far
        self.starts = Counter(on_file or {})  # of each variant
        self._setup, self._logs, self._progress = setup, logs, progress
        self._prometheus, self._labels = prometheus, labels
        self._serving: dict[str, Server] = {}

    def load(self, group: Sequence[Variant], anew: bool = False) -> bool:
        """Have the engines of these variants serve, and no others. Raises EngineError.

        With `anew` they are started again where they serve already. Returns whether any engine had
        to be started.
        """
        if not anew and self._serving.keys() == {v.name for v in group}:
            return False
        self.unload()
        with self._timed_start():  # at the same time, with one limit: their imports take long
            starting = [(v, self._start_counted(v)) for v in group]
            for variant, engine in starting:
                self._wait(variant, engine)
        return True

    def unload(self) -> None:
        for engine in self._serving.values():
            engine.stop()
        self._serving.clear()
        self._prometheus.forget("engine")  # the next engine may get the port of one of these

    @property
    def mean_start_s(self) -> float:
        """How long an engine took to start so far; 0 before the first one."""
        return self.start_s / max(1, self.started)

    @property
    def pids(self) -> list[int]:
        """List the pids above all processes of the engines that serve."""
        return [pid for engine in self._serving.values() if (pid := engine.pid) is not None]

    def alive(self, variant: Variant) -> Server | None:
        """Return the engine of a variant; None where it has died or was not started."""
        engine = self._serving.get(variant.name)
        return None if engine is None or engine.died() else engine

    @property
    def share_cpu(self) -> bool:
        """Tell whether the engines are the lab's own and compute on the CPU, as all else here does.

        Then they are suspended while others are measured, and give way to the load generator on its
        core. What an idle one costs is told in docs/notebook/2026-11-30-idle-engines.md.
        """
        return self._setup.machine.kind == "cpu" and self._setup.endpoint is None

    @contextlib.contextmanager
    def others_suspended(self, variants: Iterable[Variant]) -> Iterator[None]:
        """Suspend, on a CPU, all engines but those of these variants while the block lasts.

        When it ends, all go on: also those that the load generator suspended between their turns,
        should it have died.
        """
        if not self.share_cpu:
            yield
            return
        needed = {variant.name for variant in variants}
        try:
            for name, engine in self._serving.items():
                if name not in needed:
                    engine.suspend()
            yield
        finally:
            for engine in self._serving.values():
                engine.resume()

    def serving(self, variant: Variant) -> Server:
        """Return the engine of a variant; start a new one where it died in an earlier trial.

        Raises EngineError.
        """
        if engine := self.alive(variant):
            return engine
        if dead := self._serving.get(variant.name):
            dead.stop()
        with self._timed_start():
            engine = self._start_counted(variant)
            self._wait(variant, engine)
        return engine

    @contextlib.contextmanager
    def _timed_start(self) -> Iterator[None]:
        """Note how long it takes until all engines that are started together serve."""
        began = time.monotonic()
        yield
        if self._setup.endpoint is None:
            self._setup.clock.starts_s.append(round(time.monotonic() - began, 1))

    def _start_counted(self, variant: Variant) -> Server:
        self.started += 1
        self.starts[variant.name] += 1
        return self._start(variant)

    def _start(self, variant: Variant) -> Server:
        setup = self._setup
        if setup.endpoint:
            self._serving[variant.name] = setup.endpoint
            return setup.endpoint
        flags = setup.lab.engine_flags_of(variant)
        engine = engine_of(variant.engine, flags)(
            variant.name,
            setup.weights.get(variant.name, setup.model),
            with_places(flags, setup.places),
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
        engine.wait(
            lambda s: self._progress.waiting(f"{starting}: {s:.0f} s{about}"),
            self._setup.clock.start_timeout_s,
        )
        if self.share_cpu:  # else what looks out for a step's end keeps clients from their core
            engine.give_way(machines.split_cores()[1])
        self.start_s += time.monotonic() - began
        serves = f"{engine.title} ({variant.name}) serves at {engine.url}"
        self._progress.message(f"{serves} after {engine.age_s:.0f} s")
        for replica, url in engine.scraped.items() if engine.shown_metrics() else ():
            labels = {**self._labels, "variant": variant.name, "replica": replica}
            self._prometheus.scrape("engine", url, {k: v for k, v in labels.items() if v})
