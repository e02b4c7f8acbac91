"""`labs all` on a clock: what one call does not get done, the next ones do."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest

from tests.fake.conftest import Command, Reader
from tests.sizes import BRIEF, sizes_of

LAB = "single-stream"
TIME_USED_UP = 75


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A sitting of one's own: other tests and readers have theirs in the checkout's cache."""
    folder = tmp_path / "sitting"
    folder.mkdir()
    return folder


def call(reader: Reader, sitting: Path, seconds: int) -> Command:
    script = (
        "import pathlib, labs.harness.cli.all_labs as a;"
        f" a.FOLDER = pathlib.Path({str(sitting)!r});"
        " from tests.fake.quiet import app; app()"
    )
    return reader.types(
        "all",
        program=("-c", script),
        ONLY=LAB,
        SECONDS=str(seconds),
        SET=f"{BRIEF} {sizes_of(LAB).fake}",
        ARCHIVE=str(reader.home / "results.tar.gz"),
    )


def test_a_lab_is_finished_over_several_calls(reader: Reader, checkout: Path) -> None:
    first = call(reader, checkout, 16)  # less than one trial and what is kept for closing
    assert first.wait() == TIME_USED_UP, first.said
    assert "may last 16 s" in first.said
    assert f"To be done: {LAB}." in first.said
    assert re.search(r"prompts took \d+\.\d s", first.said)
    folder = first.folder
    trials = set(folder.path.glob("trials/**/trial.json"))
    # a call that is too short for anything still gets one done, here with the one beside it
    assert {path.parts[-4:-2] for path in trials} == {("decode", "concurrent-1")}
    run = folder.run()
    played = {p.key: found for p in run.points() if (found := folder.trial_result(p, 1))}
    second = call(reader, checkout, 600)
    assert second.wait() == 0, second.said
    assert second.folder.complete  # the only run
    for point in run.points():
        assert played.get(point.key) in (None, second.folder.trial_result(point, 1))
    assert not (folder.path / "report.html").exists()  # written at home
    with tarfile.open(reader.home / "results.tar.gz") as packed:
        names = packed.getnames()
    place = folder.path.relative_to(reader.results.parent)
    assert f"{place}/COMPLETE" in names
    assert any(name.startswith(f"{place}/logs/engine-") for name in names)
