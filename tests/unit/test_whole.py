"""A file or a folder is there whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from labs.harness.storage.recorded import TrialResult
from labs.harness.storage.writing import write_trial
from serving import atomic
from serving.models.catalog import ROOT


def test_a_file_is_replaced_as_a_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    assert atomic.write(path, "é\n") == path
    assert atomic.write(path, b"\x00\x01").read_bytes() == b"\x00\x01"
    with atomic.file(path) as half:
        half.write_text("later")
        assert path.read_bytes() == b"\x00\x01"
    assert path.read_text() == "later"
    assert list(path.parent.iterdir()) == [path]


def test_what_is_to_be_on_the_disk_is_there_before_its_name_and_a_trial_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave an empty `trial.json`, or one without its requests."""
    done, fsync, rename = list[int](), os.fsync, Path.rename

    def synced(handle: int) -> None:
        done.append(os.fstat(handle).st_ino)
        fsync(handle)

    def renamed(half: Path, path: Path) -> Path:
        assert {half.stat().st_ino, requests.stat().st_ino} <= set(done)
        return rename(half, path)

    requests = atomic.write(tmp_path / "trial" / "requests.jsonl.gz", b"")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    write_trial(requests.parent, TrialResult(point="on/short/concurrent-1", repeat=1))
    assert done[-1] == requests.parent.stat().st_ino


class CutOff(Exception):
    """Stands for whatever ends a write before it is complete."""


def cut_off(make: Callable[[Path], AbstractContextManager[Path]], path: Path) -> Path:
    """Begin to write there and fail; the name under which it was begun."""
    begun: list[Path] = []

    def write() -> None:
        with make(path) as half:
            begun.append(half)
            (half / "part" if half.is_dir() else half).write_text("half of it")
            raise CutOff

    with pytest.raises(CutOff):
        write()
    return begun[0]


def test_what_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = atomic.write(tmp_path / "file", "before")
    cut_off(atomic.file, path)
    cut_off(atomic.folder, tmp_path / "folder")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_without_room_is_told_by_the_file_that_found_none(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="file'") as failed, atomic.file(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert failed.value.filename == str(tmp_path / "file")


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path: Path) -> None:
    path = tmp_path / "file"
    left = cut_off(atomic.file, path)
    left.write_text("left")
    left.chmod(0o644)
    atomic.write(path, "secret", mode=0o600)
    assert path.read_text() == "secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nothing_but_a_regular_file_is_replaced(tmp_path: Path) -> None:
    """As /dev/full, /dev/stdout and a folder are: a rename would put a file in their place."""
    pipe, link, broken, home = (tmp_path / name for name in ("pipe", "link", "broken", "home"))
    os.mkfifo(pipe)
    link.symlink_to(atomic.write(tmp_path / "file", "before"))
    broken.symlink_to("nowhere")
    home.mkdir()
    before = {path: path.lstat().st_mode for path in tmp_path.iterdir()}
    for path in (pipe, link, broken, home, home / "..", Path(".")):
        with pytest.raises(FileExistsError, match="regular file"):
            atomic.write(path, "after")
    assert {path: path.lstat().st_mode for path in tmp_path.iterdir()} == before


def test_a_folder_appears_when_it_is_filled(tmp_path: Path) -> None:
    path = tmp_path / "models" / "folder"
    with atomic.folder(path) as half:
        (half / "part").write_text("all of it")
        assert not path.exists()
    assert (path / "part").read_text() == "all of it"
    assert list(path.parent.iterdir()) == [path]


def test_git_ignores_what_a_killed_process_leaves(tmp_path: Path) -> None:
    left = ROOT / "results" / cut_off(atomic.file, tmp_path / "x.json").name
    asked = subprocess.run(["git", "check-ignore", "-q", str(left)], cwd=ROOT, check=False)
    assert asked.returncode == 0


def test_a_file_in_the_place_of_its_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    with pytest.raises(NotADirectoryError, match="home"):
        atomic.write(tmp_path / "home" / "x", "")
