"""The rehearsal of a session on a locked-down GPU machine, as far as it takes no half hour."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from labs.harness.running.run import PROMPTS_TOOK
from labs.harness.running.sitting_plan import plan, table
from labs.harness.running.trials import MOST_AGAIN, PER_TRIAL_S
from serving import bundle
from tests.rehearsal import __main__ as rehearsal
from tests.rehearsal.__main__ import CANNOT, Box, prompts_s, unpacking

PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"


def test_a_call_that_has_not_ended_by_its_limit_is_killed(tmp_path: Path) -> None:
    (tmp_path / "go.sh").write_text(f"echo begun >> {tmp_path}/said; sleep 60; echo late\n")
    box = Box(tmp_path, call_s=530, only="")
    assert box.call(tmp_path, killed_after_s=1) is None
    assert (tmp_path / "said").read_text() == "begun\n"
    (tmp_path / "go.sh").write_text("exit 75\n")
    assert box.call(tmp_path, killed_after_s=60) == 75


def test_each_lab_has_the_model_that_the_box_would_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABS_MODEL", "llama-1b")  # of the reader's shell
    environment = Box(tmp_path, call_s=530, only="mixture-of-experts").environment()
    assert "LABS_MODEL" not in environment  # a mixture has a shape of its own
    assert environment["LABS_ONLY"] == "mixture-of-experts"


def test_the_plan_says_when_a_lab_ends_at_the_latest() -> None:
    first, second = plan(["single-stream", "kv-quantization"], "gpu-80", start_s=45.0)
    again_s = MOST_AGAIN * (first.load_s + first.trials * PER_TRIAL_S)
    assert first.latest_s == pytest.approx(first.ends_s + again_s)
    assert second.latest_s - first.latest_s > second.takes_s
    assert table([first]).splitlines()[1].split()[-4:-2] == [f"{first.ends_s / 60:.1f}", "min"]
    assert table([first]).endswith(f"{first.latest_s / 60:.1f} min")


def test_wheels_that_were_downloaded_are_installed_once_and_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "CACHE", tmp_path / "cache")
    assert "no wheels" in unpacking(tmp_path / "unpacked")
    wheels = tmp_path / "cache" / "bundle" / f"wheels-{PYTHON}"
    wheels.mkdir(parents=True)
    bundle.write_empty_wheel(wheels, "first", "1.0")
    bundle.write_empty_wheel(wheels, "second", "1.0")
    assert "2 wheels" in unpacking(tmp_path / "unpacked")
    assert len([*wheels.iterdir()]) == 2
    assert not (tmp_path / "unpacked").exists()


def test_the_seconds_of_prompts_are_read_from_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert prompts_s(log) == []
    log.write_text(f"{PROMPTS_TOOK.format('2.5')}\nother\n{PROMPTS_TOOK.format('0.1')}\n")
    assert prompts_s(log) == [2.5, 0.1]


def test_it_says_what_it_cannot_show() -> None:
    told = CANNOT.format(start_s=rehearsal.ENGINE_START_S, times=1 + MOST_AGAIN)
    for words in ("one law", "starts in 45 s", "up to 3 times", "one empty wheel"):
        assert words in told
