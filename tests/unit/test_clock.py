"""What fits into the time of a call, in which order labs are taken, and what is taken home."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from labs import FIRST, LABS
from labs.harness.cli import all_labs
from labs.harness.plan.time_budget import CLOSING_S, START_S, Clock, TimeUsedUp
from labs.harness.spec.lab import LabError
from labs.harness.storage import archive
from serving.hardware import machine
from serving.models.catalog import ROOT


def test_what_does_not_fit_is_left_to_the_next_call() -> None:
    clock = Clock.of(100 + CLOSING_S, [], [])
    clock.require(1000, "a lab")  # a call that has done nothing yet begins something
    clock.played = True
    clock.require(90, "a trial")
    with pytest.raises(TimeUsedUp, match=r"an engine .* 120 s .*\d+ s"):
        clock.require(120, "an engine")


def test_without_an_end_everything_fits() -> None:
    clock = Clock.of(None, [], [])
    clock.played = True
    clock.require(1e9, "a lab")
    assert not clock.bounded
    assert clock.start_timeout_s is None


def test_a_probe_is_begun_where_it_fits_and_counts_as_what_a_call_has_done() -> None:
    clock = Clock(ends=time.monotonic() + 10)
    clock.require(clock.probe_s, "the first thing of a call")
    clock.probed(3.0)
    assert clock.probe_s == 3.0
    assert clock.fits(clock.probe_s)
    clock.probed(20.0)
    with pytest.raises(TimeUsedUp, match=r"the probe .* 20 s"):
        clock.require(clock.probe_s, "the probe")


def test_the_latest_starts_say_how_long_the_next_one_takes() -> None:
    clock = Clock.of(530, [], [])
    assert clock.start_s("gpu") == START_S["gpu"]
    for seconds in (110, 20, 30, 25):
        clock.starts_s.append(seconds)
    assert clock.start_s("gpu") == 30  # the first one compiled, and is forgotten
    assert clock.left_s <= 530 - CLOSING_S
    assert clock.ends > time.monotonic()


def test_labs_come_in_the_order_that_is_asked_for_or_by_value() -> None:
    assert all_labs.chosen("multi-lora, single-stream,multi-lora", False) == [
        "multi-lora",
        "single-stream",
    ]
    assert all_labs.chosen("", by_value=False) == list(LABS)
    assert all_labs.chosen("", by_value=True)[: len(FIRST)] == list(FIRST)
    assert set(all_labs.chosen("", by_value=True)) == set(LABS)
    with pytest.raises(LabError, match="'multi-lore'"):
        all_labs.chosen("multi-lore", False)
    with pytest.raises(LabError, match="names no lab"):
        all_labs.chosen(" , ", False)


def test_labs_that_were_begun_are_tried_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(all_labs, "FOLDER", tmp_path)
    state = all_labs.start(quick=True, model="", fresh=True)
    state.starts_s = [20.0]
    state.begin("single-stream")
    again = all_labs.start(quick=True, model="", fresh=False)
    assert again.order(["single-stream", "multi-lora"]) == ["multi-lora", "single-stream"]
    assert again.starts_s == [20.0]


def test_archives_hold_every_record_and_stay_small(tmp_path: Path) -> None:
    home = tmp_path / "results" / "machine"
    (home / "lab" / "run").mkdir(parents=True)
    wanted = {}
    for number in range(6):
        path = home / "lab" / "run" / f"{number}.gz"
        path.write_bytes(random.Random(number).randbytes(1000))
        wanted[f"results/machine/lab/run/{number}.gz"] = path.read_bytes()
    (home / "lab" / "run" / "report.html").write_text("told again at home")
    (home / "lab" / "run" / "link").symlink_to("/etc/passwd")
    out = tmp_path / "results.tar.gz"
    archives = archive.write(home, out, most_bytes=4500)
    assert [path.name for path in archives[:2]] == ["results.tar.gz", "results-2.tar.gz"]
    assert all(path.stat().st_size <= 4500 for path in archives)
    found = {}
    for path in archives:
        with tarfile.open(path) as packed:
            for member in packed:
                inside = packed.extractfile(member)
                assert inside
                found[member.name] = inside.read()
    assert found == wanted
    assert archive.write(home, out) == [out]  # one is enough: the others are gone
    assert sorted(p.name for p in tmp_path.glob("*.tar.gz")) == ["results.tar.gz"]


def test_what_a_killed_call_left_is_packed_by_a_command_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labs.harness.storage.results.RESULTS", tmp_path / "results")
    out = tmp_path / "results.tar.gz"
    assert archive.write_here(out) == []  # nothing was recorded
    log = (
        tmp_path / "results" / machine.detect().slug / "single-stream" / "run" / "logs" / "base.log"
    )
    log.parent.mkdir(parents=True)
    log.write_text("it failed")
    environment = {**os.environ, "LABS_RESULTS": str(tmp_path / "results")}
    command = [sys.executable, "-m", "labs.harness.storage.archive", str(out)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    with tarfile.open(out) as packed:
        assert packed.getnames() == [str(log.relative_to(tmp_path))]
