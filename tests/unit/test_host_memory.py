"""How much memory a process may still take, where a control group around it has a limit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from serving.hardware import host_memory

GIB = 2**30


@pytest.fixture(autouse=True)
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 100 GiB available."""
    monkeypatch.setattr(host_memory, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(host_memory, "OWN", tmp_path / "own")
    free = SimpleNamespace(available=100 * GIB)
    monkeypatch.setattr("serving.hardware.host_memory.psutil.virtual_memory", lambda: free)
    return tmp_path / "cgroup"


def test_what_is_free_for_processes_to_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "SHARED", tmp_path)
    free = SimpleNamespace(free=64 * 2**20)
    monkeypatch.setattr("serving.hardware.host_memory.shutil.disk_usage", lambda folder: free)
    assert host_memory.shared_bytes() == 64 * 2**20
    monkeypatch.setattr(host_memory, "SHARED", tmp_path / "none")
    assert host_memory.shared_bytes() is None


def limit(group: Path, most: str, used_gib: int = 0) -> None:
    """Give a group a limit; one of the GiB that it uses is what files had in memory."""
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used_gib * GIB}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {GIB}\n")


def test_the_tightest_limit_around_the_process_counts(groups: Path) -> None:
    host_memory.OWN.write_text("0::/slice/job\n")
    assert host_memory.available_bytes() == 100 * GIB  # no group tells anything
    limit(groups / "slice/job", "max", 3)
    assert host_memory.available_bytes() == 100 * GIB
    limit(groups / "slice", str(16 * GIB), 5)
    assert host_memory.available_bytes() == 12 * GIB
    limit(groups / "slice/job", str(8 * GIB), 20)
    assert host_memory.available_bytes() == 0
