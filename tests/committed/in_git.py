"""The published results as git keeps them, whatever lies in the checkout's own folder."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from serving.models.catalog import ROOT


def _git(*words: str, paths: str | None = None) -> str:
    """What git prints; nothing where this is no checkout."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(ROOT), *words]
    done = subprocess.run(command, input=paths, capture_output=True, text=True, check=True)
    return done.stdout


@functools.cache
def runs() -> tuple[str, ...]:
    """Name the published runs: `<machine>/<lab>/<run>`, oldest first."""
    paths = _git("ls-files", "-z", "results/*/*/*/run.json").split("\0")
    names = [path.removeprefix("results/").removesuffix("/run.json") for path in paths if path]
    return tuple(sorted(names, key=lambda name: name.rpartition("/")[2]))


def newest(lab: str) -> str:
    """Name the newest published run of a lab that repeats no other; skips where there is none."""
    for name in reversed(runs()):
        if f"/{lab}/" in name:
            run = json.loads(_git("show", f":results/{name}/run.json"))
            if not run.get("reproduces"):
                return name
    pytest.skip(f"git knows no run of {lab} here")


def write_out(home: Path) -> None:
    """Write README.md and results/ into a folder, as they are in git's index."""
    names = _git("ls-files", "-z", "README.md", "results")
    _git("checkout-index", "-z", "--stdin", f"--prefix={home}/", paths=names)
