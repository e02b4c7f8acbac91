"""The committed checkout, as docs/offline.md has it sent along with each part of a bundle."""

from __future__ import annotations

import re
import shlex
import subprocess
import tarfile
from pathlib import Path

import pytest

from serving import bundle
from serving.models.catalog import ROOT
from tests.committed import in_git

LEAST_PART_BYTES = 40e6  # a lean bundle is then five parts
MOST_SENT = str(64 * 2**20)


def git(*words: str) -> str:
    return subprocess.check_output(["git", *words], text=True)


def test_without_results_the_checkout_leaves_room_for_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_git.runs():
        pytest.skip("git knows no run here")
    page = (ROOT / "docs" / "offline.md").read_text()
    (leave_out,) = re.findall(r"^git (sparse-checkout set .+)$", page, re.M)
    copy = tmp_path / "lab"
    git("clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(copy))
    git("-C", str(copy), *shlex.split(leave_out))
    git("-C", str(copy), "checkout", "--quiet")
    monkeypatch.setattr(bundle, "ROOT", copy)
    assert bundle.fitting(MOST_SENT) >= LEAST_PART_BYTES
    assert (copy / "docs" / "offline.md").exists()
    assert not (copy / "results").exists()
    assert git("-C", str(copy), "status", "--porcelain") == ""
    archive = tmp_path / "lab.tar.xz"
    bundle.pack(archive, {})
    with tarfile.open(archive) as packed:
        names = set(packed.getnames())
    assert {"pyproject.toml", "labs/harness/spec/lab.py", "serving/unbundle.py"} <= names
    assert not any(name.startswith("results/") for name in names)
