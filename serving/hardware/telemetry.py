"""Telemetry of the hardware during trials: power, energy, clocks, throttling, memory and load.

GPUs are read through NVML ten times a second; nothing is ever set. Without a GPU the processors'
energy counters (RAPL) are read if this user may read them. Each trial's samples go to its folder,
on the trial's clock, and the newest ones are exported to Prometheus as gauges. What the hardware
does not report is missing, never 0.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, Self

import numpy as np
import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving import atomic
from serving.hardware import gpus
from serving.processes.ports import LOOPBACK

PERIOD_S = 0.1
RAPL = Path("/sys/class/powercap")
POWER_CAP = "power cap"
SLOWDOWNS = {  # bits of NVML's clock event reasons, nvml.h
    0x08: "hardware slowdown",
    0x20: "driver's thermal slowdown",
    0x40: "thermal slowdown",
    0x80: "power brake",
}
REASONS = {0x04: POWER_CAP, **SLOWDOWNS}


@dataclass(frozen=True)
class Sample:
    """A device's readings at one moment.

    `time_s` is on the machine's monotonic clock, and in a trial's file from the trial's start.
    """

    time_s: float
    device: str  # a GPU's number, or `cpu`
    power_w: float | None = None
    energy_j: float | None = None  # a counter: only differences mean something
    sm_clock_hz: float | None = None
    throttle: str | None = None  # what holds the clock down, joined by `+`; empty when nothing does
    memory_used_bytes: float | None = None
    utilization: float | None = None  # share of the last period in which any kernel ran


class Source(Protocol):
    """Reads what telemetry is sampled from."""

    def read(self) -> list[Sample]:
        """Read every device now."""

    def processes(self) -> int | None:
        """Count the processes that use the devices now; None where that is not known."""


# ---------------------------------------------------------------------------------------- sources


class Gpus:
    """The GPUs that this process may use, or the first `count` of them, read through NVML."""

    def __init__(self, nvml: ModuleType, count: int | None = None) -> None:
        self._nvml = nvml
        self._handles = gpus.visible(nvml)[:count]

    def read(self) -> list[Sample]:
        return [self._sample(i, handle) for i, handle in enumerate(self._handles)]

    def processes(self) -> int | None:
        """Count the processes that compute on these GPUs, each once a GPU."""
        try:
            running = map(self._nvml.nvmlDeviceGetComputeRunningProcesses, self._handles)
            return sum(map(len, running))
        except self._nvml.NVMLError:  # not for this user
            return None

    def _sample(self, index: int, handle: Any) -> Sample:
        n = self._nvml

        def read(query: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return query(handle, *arguments)
            except n.NVMLError:  # not on this GPU, or not for this user
                return None

        def scaled(value: float | None, factor: float) -> float | None:
            return None if value is None else value * factor

        reasons = read(n.nvmlDeviceGetCurrentClocksThrottleReasons)
        memory = read(n.nvmlDeviceGetMemoryInfo)
        load = read(n.nvmlDeviceGetUtilizationRates)
        return Sample(
            time.monotonic(),
            str(index),
            power_w=scaled(read(n.nvmlDeviceGetPowerUsage), 1e-3),
            energy_j=scaled(read(n.nvmlDeviceGetTotalEnergyConsumption), 1e-3),
            sm_clock_hz=scaled(read(n.nvmlDeviceGetClockInfo, n.NVML_CLOCK_SM), 1e6),
            throttle=None if reasons is None else named(reasons),
            memory_used_bytes=None if memory is None else memory.used,
            utilization=None if load is None else load.gpu / 100,
        )


def named(reasons: int) -> str:
    """Name the bits of NVML's clock event reasons that hold the clock down, joined by `+`."""
    return "+".join(name for bit, name in REASONS.items() if reasons & bit)


class Processors:
    """The energy of all processor packages, by RAPL; its counters wrap around."""

    def __init__(self, zones: Sequence[Path]) -> None:
        self._zones = zones
        self._range_uj = [int((z / "max_energy_range_uj").read_text()) for z in zones]
        self._last_uj = self._now_uj()
        self._used_uj = 0

    def _now_uj(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones]

    def read(self) -> list[Sample]:
        now_uj = self._now_uj()
        for now, last, wrap in zip(now_uj, self._last_uj, self._range_uj, strict=True):
            self._used_uj += now - last + (wrap if now < last else 0)
        self._last_uj = now_uj
        return [Sample(time.monotonic(), "cpu", energy_j=self._used_uj / 1e6)]

    def processes(self) -> int | None:
        """Return None: processors know no such count."""
        return None


def source(kind: str, count: int | None = None) -> Source | None:
    """Find what can be read on this kind of machine; None where nothing can.

    Of GPUs only the first `count` visible ones are watched, which are those that engines use.
    """
    if kind == "gpu":
        import pynvml

        try:
            pynvml.nvmlInit()
            return Gpus(pynvml, count)
        except pynvml.NVMLError:
            return None
    try:
        # AMD's too; others are parts of a package, or the platform with all packages in it
        zones = sorted(
            zone
            for zone in RAPL.glob("intel-rapl:*")
            if (zone / "name").read_text().startswith("package")
        )
        return Processors(zones) if zones else None
    except (OSError, ValueError):  # for root alone since 2020, and in few containers
        return None


# ----------------------------------------------------------------------------------------- a run's


class Telemetry(Collector):
    """Samples a source in a thread of its own, from entry to exit; without a source, nothing."""

    def __init__(self, source: Source | None, labels: Mapping[str, str]) -> None:
        self._source, self._labels = source, dict(labels)
        self._samples: list[Sample] = []
        self._newest: list[Sample] = []
        self._foreign = self._at_begin = self._most = source.processes() if source else None
        self._engines_started: int | None = None  # by the last begin
        self._stop_serving: Callable[[], None] = lambda: None
        self._ended = threading.Event()
        self._reading = threading.Lock()  # a source that adds up its counters has a state
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if self._source:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._source:
            self._thread.join()
        self._stop_serving()

    def _watch(self) -> None:
        assert self._source
        due = time.monotonic()
        while not self._ended.wait(max(0.0, due - time.monotonic())):
            try:
                with self._reading:
                    self._newest = self._source.read()
                self._most = max(self._most or 0, self._source.processes() or 0)
            except Exception:  # whatever a driver raises: only this moment is missing
                self._newest = []
            self._samples.extend(self._newest)  # not +=, which would undo a concurrent begin()
            due = max(due + PERIOD_S, time.monotonic())

    def begin(self, variant: str, engines_started: int) -> None:
        """Begin a trial of this variant, or another attempt at one: earlier samples are dropped.

        Until another engine is started, of the run's `engines_started` so far, the fewest processes
        at any begin are taken to be the engines': a stranger who came since is no part of them.
        """
        same = self._engines_started == engines_started
        self._labels["variant"], self._engines_started = variant, engines_started
        self._samples = []
        self._most = now = self._source.processes() if self._source else None
        known = [n for n in (self._at_begin if same else None, now) if n is not None]
        self._at_begin = min(known, default=None)

    def foreign_processes(self) -> int | None:
        """Count the processes of others on the GPUs during the trial; None where it is not known.

        They are those that were there before any engine, and those that came since the first trial
        after the last start of an engine. What came with an engine is taken to be the engine's: its
        pids may be those of another namespace.
        """
        if self._foreign is None or self._at_begin is None or self._most is None:
            return None
        return self._foreign + max(0, self._most - self._at_begin)

    def write(self, path: Path, started_monotonic_s: float | None) -> None:
        """Write the trial's samples, with times from its start on this machine's monotonic clock.

        Without samples, or where the start is not known, no file. The last one is taken now, so
        that the counters of energy cover a window that ends with the trial.
        """
        if self._source:
            with contextlib.suppress(Exception), self._reading:  # whatever a driver raises
                self._samples.extend(self._source.read())
        if self._samples and started_monotonic_s is not None:
            in_order = sorted(self._samples, key=lambda sample: sample.time_s)
            write(path, in_order, started_monotonic_s)

    def serve(self, port: int) -> bool:
        """Export the newest samples to Prometheus, on loopback; return False without a GPU."""
        if not isinstance(self._source, Gpus):
            return False
        registry = CollectorRegistry()
        registry.register(self)
        server, _ = prometheus_client.start_http_server(port, LOOPBACK, registry)

        def stop() -> None:
            server.shutdown()
            server.server_close()

        self._stop_serving = stop
        return True

    def collect(self) -> Iterator[Metric]:
        """Yield the newest samples as Prometheus's metrics; none before the first trial."""
        labels = ("lab", "variant", "run_id", "gpu")
        exported = self._newest if "variant" in self._labels else []
        for name, text, of in _GAUGES:
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(name, text, labels=labels)
            for sample in exported:
                if (value := of(sample)) is not None:
                    run_labels = [self._labels[label] for label in labels[:-1]]
                    family.add_metric([*run_labels, sample.device], value)
            yield family


def _throttled(sample: Sample) -> float | None:
    return None if sample.throttle is None else float(bool(sample.throttle))


GPU_POWER, GPU_ENERGY = "lab_gpu_power_watts", "lab_gpu_energy_joules_total"
GPU_CLOCK, GPU_MEMORY = "lab_gpu_sm_clock_hertz", "lab_gpu_memory_used_bytes"
GPU_UTILISATION, GPU_THROTTLED = "lab_gpu_utilization_ratio", "lab_gpu_throttled"
_GAUGES: tuple[tuple[str, str, Callable[[Sample], float | None]], ...] = (
    (GPU_POWER, "Power drawn", lambda s: s.power_w),
    (GPU_ENERGY, "Energy since the driver was loaded", lambda s: s.energy_j),
    (GPU_CLOCK, "Clock of the multiprocessors", lambda s: s.sm_clock_hz),
    (GPU_MEMORY, "Memory in use", lambda s: s.memory_used_bytes),
    (GPU_UTILISATION, "Share of time in which a kernel ran", lambda s: s.utilization),
    (GPU_THROTTLED, "1 while heat, a slowdown or a power cap holds the clock", _throttled),
)
SERIES = tuple(name for name, _, _ in _GAUGES)


# --------------------------------------------------------------------------------- a trial's file

_COLUMNS = tuple(f.name for f in fields(Sample))
_TEXT = ("device", "throttle")
MOST_BYTES = 2**26  # of a trial's samples, unpacked: eight GPUs have them in an hour and a half


def write(path: Path, samples: Sequence[Sample], started_monotonic_s: float) -> None:
    """Write a trial's samples as gzipped CSV, with times from its start; an empty cell is None."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(_COLUMNS)
    for sample in samples:
        values = [getattr(sample, name) for name in _COLUMNS[1:]]
        plain = ["none" if value == "" else value for value in values]  # an empty cell is None
        rows.writerow([f"{sample.time_s - started_monotonic_s:.3f}", *plain])
    atomic.write(path, gzip.compress(text.getvalue().encode(), mtime=0))


def read(path: Path) -> list[Sample]:
    """Read a trial's samples, with times from its start; none where there is no file.

    Raises ValueError where it has more samples than a trial can have, or is no table.
    """
    if not path.exists():
        return []
    with gzip.open(path) as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ValueError(f"{path}: more than {MOST_BYTES} bytes of samples")
    samples = []
    try:
        for row in csv.DictReader(io.StringIO(text.decode(), newline="")):
            plain: dict[str, Any] = {
                name: (cell if name in _TEXT else float(cell)) if cell else None
                for name, cell in row.items()
            }
            if plain["throttle"] == "none":
                plain["throttle"] = ""
            samples.append(Sample(**plain))
    except csv.Error as error:
        raise ValueError(f"{path}: {error}") from error
    return samples


def within(samples: Sequence[Sample], start_s: float, end_s: float) -> list[Sample]:
    """Select the samples between two times, of the devices that worked: idle GPUs do not count."""
    inside = [s for s in samples if start_s <= s.time_s <= end_s]
    busy = {s.device for s in inside if s.utilization is None or s.utilization > 0}
    return [s for s in inside if s.device in busy]


def energy_j(samples: Sequence[Sample], start_s: float, end_s: float) -> float | None:
    """Compute the energy between two moments, by interpolating each working device's counter.

    None unless the counters of all of them cover the time.
    """
    busy = {s.device for s in within(samples, start_s, end_s)}
    used = []
    for device in busy:
        own = [s for s in samples if s.device == device]
        readings = [(s.time_s, s.energy_j) for s in own if s.energy_j is not None]
        if not readings or readings[0][0] > start_s or readings[-1][0] < end_s:
            return None
        times, counts = zip(*readings, strict=True)
        used.append(float(np.interp(end_s, times, counts) - np.interp(start_s, times, counts)))
    return sum(used) if used else None


def throttled_share(samples: Sequence[Sample], reasons: Sequence[str]) -> float | None:
    """Compute the share of samples in which any of these reasons held the clock down.

    None where no sample has the reasons.
    """
    causes = [s.throttle.split("+") for s in samples if s.throttle is not None]
    return sum(bool(set(reasons) & set(c)) for c in causes) / len(causes) if causes else None
