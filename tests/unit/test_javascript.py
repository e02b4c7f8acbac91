"""The modules of the live page and the scripts of the pages, tested in their own language."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from serving.models.catalog import ROOT

DENO = shutil.which("deno", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
TESTS = sorted(Path(__file__).parent.glob("*.test.js"))


@pytest.mark.skipif(DENO is None, reason="no deno: `make setup` brings it")
def test_javascript(tmp_path: Path) -> None:
    """One process runs all files, as it takes most of its time to start.

    `make check` checks their types, which would take it longer than all tests.
    """
    assert TESTS
    environment = {**os.environ, "DENO_DIR": str(tmp_path), "NO_COLOR": "1"}
    command = [str(DENO), "test", "--no-check", "--no-remote", f"--allow-read={ROOT}"]
    ended = subprocess.run(
        [*command, *map(str, TESTS)], env=environment, text=True, capture_output=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for path in TESTS:
        assert f"/{path.name}" in ended.stdout, ended.stdout
