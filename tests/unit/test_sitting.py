"""A sitting of several labs goes on whatever ends one of them, and packs what that one left."""

from __future__ import annotations

import errno
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from labs.harness.cli import all_labs
from labs.harness.cli.cli import app
from labs.harness.plan.resolve import RunRequest
from labs.harness.plan.time_budget import TimeUsedUp
from labs.harness.runner.resume import CannotResume
from labs.harness.spec.lab import LabError, NotApplicable
from labs.harness.storage import results
from serving import atomic
from serving.hardware.machine import detect

FIRST, SECOND, THIRD = LABS = ("single-stream", "multi-lora", "overload")
Play = Callable[[str], None]


pytestmark = pytest.mark.usefixtures("signals_as_found")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this machine's results, of a sitting that nobody else has."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(all_labs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(all_labs, "FOLDER", tmp_path / "sitting")
    monkeypatch.setattr(all_labs, "check_flags", lambda *_: None)  # imports vLLM
    return tmp_path / "results" / detect().slug


@pytest.fixture
def sit(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, list[str]]]:
    """Plays the labs by a function of their name; returns exit code, output and the labs played."""

    def call(play: Play, *labs: str, seconds: int = 0) -> tuple[int, str, list[str]]:
        played = list[str]()

        def run(request: RunRequest, *_: object) -> None:
            played.append(request.lab.name)
            play(request.lab.name)

        monkeypatch.setattr("labs.harness.cli.run_lab.run_lab", run)
        archive = str(home.parents[1] / "results.tar.gz")
        arguments = ("all", "--only", ",".join(labs or LABS), "--archive", archive)
        bounded = ("--seconds", str(seconds)) if seconds else ()
        called = CliRunner().invoke(app, (*arguments, *bounded))
        return called.exit_code, " ".join(called.output.split()), played

    return call


def packed(home: Path) -> dict[str, bytes]:
    """Read the files of the archive, by their names below the folder of the machine."""
    found = {}
    with tarfile.open(home.parents[1] / "results.tar.gz") as archive:
        for member in archive:
            inside = archive.extractfile(member)
            assert inside
            found[member.name.removeprefix(f"results/{home.name}/")] = inside.read()
    return found


@pytest.mark.parametrize(
    "fault",
    [RuntimeError("CUDA error"), ValueError("no figure"), KeyError("metric"), MemoryError()],
)
def test_a_fault_of_one_lab_ends_that_lab_alone_and_its_traceback_is_taken_home(
    sit: Callable[..., tuple[int, str, list[str]]], home: Path, fault: Exception
) -> None:
    kept = list[str]()

    def play(lab: str) -> None:
        if lab == FIRST:
            atomic.write(home / lab / "run" / "logs" / "engine-on.log", "out of blocks")
            raise fault
        kept.extend(
            packed(home) if lab == SECOND else ()
        )  # in case the call is killed from here on
        raise NotApplicable("not here")

    code, said, played = sit(play)
    assert (code, played) == (1, list(LABS))
    (log,) = home.glob(f"{FIRST}/error-*.log")
    assert f"error: {type(fault).__name__}" in said
    assert f"/{log.name})" in said
    assert "Traceback" not in said
    assert "Traceback (most recent call last):" in log.read_text()
    assert f"{FIRST}/run/logs/engine-on.log" in kept
    assert packed(home)[f"{FIRST}/{log.name}"] == log.read_bytes()
    *_, again = sit(play)
    assert again == [SECOND, THIRD, FIRST]


def test_a_traceback_has_no_secret(
    sit: Callable[..., tuple[int, str, list[str]]], home: Path
) -> None:
    def play(lab: str) -> None:
        raise RuntimeError(f"token='hf_{'a' * 30}'")

    _, said, _ = sit(play, FIRST)
    (log,) = home.glob(f"{FIRST}/error-*.log")
    assert "hf_aaa" not in said + log.read_text()


def test_a_disk_without_room_ends_the_lab_in_a_sentence_that_says_what_mends_it(
    sit: Callable[..., tuple[int, str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(lab: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "records")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("labs.harness.storage.archive.write", full)
    write = atomic.write
    monkeypatch.setattr(
        atomic,
        "write",
        lambda path, text, **how: full() if path.suffix == ".log" else write(path, text, **how),
    )
    code, said, played = sit(play)
    assert (code, played) == (1, list(LABS))
    assert "(records): free some" in said
    assert "traceback" not in said  # there was no room for it


def test_an_expected_error_has_its_sentence_and_no_traceback(
    sit: Callable[..., tuple[int, str, list[str]]], home: Path
) -> None:
    def play(lab: str) -> None:
        raise LabError("the port is taken")

    _, said, _ = sit(play, FIRST)
    assert f"{FIRST}: the port is taken" in said
    assert not list(home.glob("*/error-*.log"))


@pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(143)])
def test_who_stops_a_call_stops_all_of_it_and_has_its_archive(
    sit: Callable[..., tuple[int, str, list[str]]], home: Path, end: BaseException
) -> None:
    def play(lab: str) -> None:
        atomic.write(home / lab / "run" / "run.json", "{}")
        raise end

    code, _, played = sit(play)
    assert code in (130, 143)
    assert played == [FIRST]
    assert f"{FIRST}/run/run.json" in packed(home)


@pytest.mark.parametrize(
    ("end", "seconds", "comes_last"),
    [
        (SystemExit(137), 0, True),  # as one that needs more memory than there is
        (KeyboardInterrupt(), 60, True),  # by a time limit
        (KeyboardInterrupt(), 0, False),  # by a person
        (LabError("the port is taken"), 0, True),
    ],
)
def test_a_lab_that_fails_or_in_which_a_call_is_killed_comes_last(
    sit: Callable[..., tuple[int, str, list[str]]],
    end: BaseException,
    seconds: int,
    comes_last: bool,
) -> None:
    def play(lab: str) -> None:
        if lab == FIRST:
            raise end
        raise NotApplicable("not here")

    sit(play, seconds=seconds)
    assert sit(play, seconds=seconds)[2][0] == (SECOND if comes_last else FIRST)


def test_a_begin_that_the_clock_ends_is_not_held_against_a_lab(
    sit: Callable[..., tuple[int, str, list[str]]],
) -> None:
    def play(lab: str) -> None:
        if lab == FIRST:
            raise NotApplicable("not here")
        raise TimeUsedUp("10 s are left")

    for _ in range(4):
        assert sit(play)[::2] == (75, [FIRST, SECOND])


def test_a_lab_that_is_begun_anew_within_a_call_is_counted_once(
    sit: Callable[..., tuple[int, str, list[str]]],
) -> None:
    ends = iter([SystemExit(137), CannotResume("the model is another"), SystemExit(137)])

    def play(lab: str) -> None:
        raise next(ends)

    assert sit(play, FIRST)[2] == [FIRST]
    assert sit(play, FIRST)[2] == [FIRST, FIRST]
    (record,) = all_labs.FOLDER.glob("*.json")
    state = all_labs.Sitting.model_validate_json(record.read_text())
    assert state.labs[FIRST].ended_early == 2
