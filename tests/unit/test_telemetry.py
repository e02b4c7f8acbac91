"""What the hardware did: read through a stand-in for NVML, kept per trial, judged."""

from __future__ import annotations

import gzip
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest

from labs.harness.analysis.checks.expected import Expected
from labs.harness.analysis.measure import Trial
from labs.harness.analysis.metrics import METRICS
from labs.harness.analysis.validity import caveats_of
from serving.hardware import telemetry
from serving.hardware.telemetry import Gpus, Sample, Telemetry
from serving.processes.ports import free_port
from tests.fake.nvml import make_nvml, unsupported
from tests.unit.builders import make_record, make_trial

LABELS = {"lab": "tiny", "run_id": "r1"}


@pytest.fixture(autouse=True)
def _every_gpu_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_gpu_is_read_in_plain_units() -> None:
    (found,) = Gpus(make_nvml(nvmlDeviceGetTotalEnergyConsumption=lambda h: 5_000)).read()
    assert found == Sample(
        found.time_s, "0", 300.0, 5.0, 1.755e9, "power cap+thermal slowdown", 2**30, 0.87
    )


def test_what_a_gpu_does_not_tell_is_missing_not_zero() -> None:
    refused = {
        name: unsupported
        for name in (
            "nvmlDeviceGetTotalEnergyConsumption",
            "nvmlDeviceGetCurrentClocksThrottleReasons",
            "nvmlDeviceGetUtilizationRates",
        )
    }
    (found,) = Gpus(make_nvml(**refused)).read()
    assert (found.energy_j, found.throttle, found.utilization) == (None, None, None)
    assert found.power_w == 300.0


def test_without_a_source_a_trial_leaves_no_file(tmp_path: Path) -> None:
    with Telemetry(None, LABELS) as watched:
        assert not watched.serve(free_port())
        watched.begin("off", 1)
        watched.write(tmp_path / "telemetry.csv.gz", 0)
    assert list(tmp_path.iterdir()) == []
    assert telemetry.read(tmp_path / "telemetry.csv.gz") == []


def test_a_trials_samples_go_to_its_file_and_the_newest_to_prometheus(tmp_path: Path) -> None:
    port, began = free_port(), time.monotonic()
    nvml = make_nvml(nvmlDeviceGetTotalEnergyConsumption=lambda h: 5_000)
    with Telemetry(Gpus(nvml), LABELS) as watched:
        assert watched.serve(port)
        watched.begin("on", 1)
        while len(watched._samples) < 3:
            time.sleep(0.01)
        watched.write(tmp_path / "telemetry.csv.gz", began)
        url = f"http://127.0.0.1:{port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            shown = answer.read().decode()
    found = telemetry.read(tmp_path / "telemetry.csv.gz")
    assert len(found) >= 3
    assert 0 <= found[0].time_s <= found[-1].time_s <= time.monotonic() - began
    assert found[-1].throttle == "power cap+thermal slowdown"
    labels = '{gpu="0",lab="tiny",run_id="r1",variant="on"}'
    for line in (
        f"lab_gpu_power_watts{labels} 300.0",
        f"lab_gpu_energy_joules_total{labels} 5.0",
        f"lab_gpu_sm_clock_hertz{labels} 1.755e+09",
        f"lab_gpu_utilization_ratio{labels} 0.87",
        f"lab_gpu_throttled{labels} 1.0",
    ):
        assert line in shown.splitlines()


def test_a_source_that_falters_once_goes_on(tmp_path: Path) -> None:
    """The moment is missing; what comes after it is not."""

    class Faltering:
        reads = 0

        def read(self) -> list[Sample]:
            self.reads += 1
            if self.reads == 1:
                raise OSError("the counter is gone")
            return Gpus(make_nvml()).read()

        def processes(self) -> int | None:
            return None

    source, path = Faltering(), tmp_path / "telemetry.csv.gz"
    with Telemetry(source, LABELS) as watched:
        watched.begin("on", 1)
        deadline = time.monotonic() + 10
        while source.reads < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        watched.write(path, 0)
    assert telemetry.read(path)


def test_the_last_sample_is_taken_as_the_trial_is_written(tmp_path: Path) -> None:
    """The window may end with the trial, and its energy is known up to the last reading."""
    nvml = make_nvml(nvmlDeviceGetTotalEnergyConsumption=lambda h: 5_000)
    watched = Telemetry(Gpus(nvml), LABELS)  # it samples nothing by itself
    watched._samples += Gpus(nvml).read()
    end_s = time.monotonic()
    watched.write(tmp_path / "telemetry.csv.gz", 0)
    times = [sample.time_s for sample in telemetry.read(tmp_path / "telemetry.csv.gz")]
    assert times == sorted(times)
    assert times[0] <= round(end_s, 3) <= times[-1]


def test_a_file_keeps_untold_apart_from_nothing(tmp_path: Path) -> None:
    samples = [Sample(100.0, "0", throttle=""), Sample(100.1, "0", power_w=0.0)]
    telemetry.write(tmp_path / "t.csv.gz", samples, started_monotonic_s=100.0)
    first, second = telemetry.read(tmp_path / "t.csv.gz")
    assert (first.throttle, first.power_w) == ("", None)
    assert (second.throttle, second.power_w, second.time_s) == (None, 0.0, 0.1)


def test_a_file_of_more_samples_than_a_trial_has_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.csv.gz"
    telemetry.write(path, [Sample(1.0, "0")] * 100, 0.0)
    size = len(gzip.decompress(path.read_bytes()))
    monkeypatch.setattr(telemetry, "MOST_BYTES", size)
    assert len(telemetry.read(path)) == 100
    monkeypatch.setattr(telemetry, "MOST_BYTES", size - 1)
    with pytest.raises(ValueError, match="bytes of samples"):
        telemetry.read(path)


def test_without_a_driver_or_a_counter_there_is_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", make_nvml(nvmlInit=unsupported))
    monkeypatch.setattr(telemetry, "RAPL", tmp_path)
    assert telemetry.source("gpu") is None
    assert telemetry.source("cpu") is None


def rapl(folder: Path, used_uj: int, most_uj: int = 1_000_000) -> Path:
    zone = folder / "intel-rapl:0"
    zone.mkdir(exist_ok=True)
    (zone / "name").write_text("package-0\n")
    (zone / "energy_uj").write_text(str(used_uj))
    (zone / "max_energy_range_uj").write_text(str(most_uj))
    return zone


def test_a_processors_counter_that_wraps_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rapl(tmp_path, 900_000)
    # a part of the package, counted with it, and the platform, which has the package in it
    for name, kind in (("intel-rapl:0:0", "core"), ("intel-rapl:1", "psys")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(f"{kind}\n")
    monkeypatch.setattr(telemetry, "RAPL", tmp_path)
    read = telemetry.source("cpu")
    assert read
    rapl(tmp_path, 100_000)
    assert [s.energy_j for s in read.read()] == [pytest.approx(0.2)]


# --------------------------------------------------------------------------- a trial's own figures


def draw(
    watts: float, device: str = "0", utilization: float = 1.0, throttle: Sequence[str] = ("",)
) -> list[Sample]:
    """Every half second from 8 to 22 s, around the window from 10 to 20 s."""
    return [
        Sample(
            t / 2, device, watts, watts * t / 2, 1e9, throttle[t % len(throttle)], 1.0, utilization
        )
        for t in range(16, 45)
    ]


def trial_with(samples: list[Sample]) -> Trial:
    """The window is one cycle of a hundred tokens."""
    record = make_record([(11.0, 50), (12.0, 50)], end_s=20.0)
    return make_trial([record], telemetry=samples)


def test_joules_a_token_count_the_gpus_that_worked_over_the_window() -> None:
    of = METRICS["joules_per_token"].of
    busy, idle = draw(300), draw(70, device="1", utilization=0.0)
    assert of(trial_with(busy)) == pytest.approx(300 * 10 / 100)
    assert of(trial_with([*busy, *idle])) == pytest.approx(30)
    assert of(trial_with([*busy, *draw(200, device="1")])) == pytest.approx(50)


def test_joules_a_token_need_counters_over_the_whole_window() -> None:
    of = METRICS["joules_per_token"].of
    assert of(trial_with([])) is None
    assert of(trial_with([s for s in draw(300) if s.time_s > 10.6])) is None
    assert of(trial_with([Sample(s.time_s, "0", 300.0) for s in draw(300)])) is None


def caveats(samples: list[Sample]) -> list[str]:
    return [c.name for c in caveats_of(trial_with(samples), Expected())]


def test_a_slowed_trial_gets_its_caveat_and_an_idle_gpus_heat_does_not() -> None:
    hot = draw(300, throttle=["thermal slowdown", "", ""])
    assert "throttled" in caveats(hot)
    assert "throttled" not in caveats(draw(300))
    cool = draw(300)
    assert "throttled" not in caveats([*cool, *draw(70, "1", 0.0, ["thermal slowdown"])])


def test_a_power_cap_is_a_caveat_where_it_held_for_most_of_the_window() -> None:
    assert "at the power limit" in caveats(draw(700, throttle=["power cap"]))
    assert "at the power limit" not in caveats(draw(700, throttle=["power cap", "", ""]))
    assert "throttled" not in caveats(draw(700, throttle=["power cap"]))


def test_processes_of_others_are_those_before_any_engine_and_those_that_come_within_a_trial() -> (
    None
):
    running = [[1], [1, 2], [1, 2, 3]]  # a stranger's; with our engine's; with another stranger's
    now = list[int]()
    nvml = make_nvml(nvmlDeviceGetComputeRunningProcesses=lambda h: now)
    now[:] = running[0]
    watched = Telemetry(Gpus(nvml), LABELS)
    assert watched.foreign_processes() == 1
    now[:] = running[1]
    watched.begin("off", 1)
    assert watched.foreign_processes() == 1
    with watched:
        now[:] = running[2]
        deadline = time.monotonic() + 30
        while watched.foreign_processes() == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert watched.foreign_processes() == 2
    assert Telemetry(None, LABELS).foreign_processes() is None


def test_a_stranger_who_came_in_a_discarded_attempt_is_one_in_the_next_too() -> None:
    now = [1]  # our engine's
    nvml = make_nvml(nvmlDeviceGetComputeRunningProcesses=lambda h: now)
    watched = Telemetry(Gpus(nvml), LABELS)
    watched._foreign = 0
    watched.begin("off", 1)
    now[:] = [1, 2]
    for _ in range(2):  # attempts, or trials
        watched.begin("off", 1)
        assert watched.foreign_processes() == 1
    now[:] = [1]
    watched.begin("off", 1)
    assert watched.foreign_processes() == 0
    now[:] = [1, 3, 4]  # an engine with two processes
    watched.begin("tp", 2)
    assert watched.foreign_processes() == 0
