"""Tells which results git tracks: pages that are generated from results include no others.

A reader's own runs lie in the same folders as the published ones; `git add` publishes a run. The
folders that git is asked about may come from anybody.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from labs.harness.storage import results
from labs.harness.storage.results import RunFolder, all_runs


def tracked_names(folder: Path, *patterns: str) -> list[str]:
    """Name the files below a folder that git tracks, relative to it; none without a repository.

    A repository's own configuration may name programs that git starts: of those that listing files
    would start, none is.
    """
    if shutil.which("git") is None or not folder.is_dir():
        return []
    harmless = ["-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}"]
    command = ["git", *harmless, "-C", str(folder), "ls-files", "-z", *patterns]
    names = subprocess.run(command, capture_output=True, text=True).stdout.split("\0")
    return [name for name in names if name]


def tracked(paths: Iterable[Path], within: Path) -> list[Path]:
    """Keep those of the paths, all of them below `within`, that git tracks.

    Where git tracks nothing there (no git, an archive without a repository, a folder elsewhere),
    all paths are kept.
    """
    if not (there := list(paths)):
        return []  # git need not be asked
    names = set(tracked_names(within))
    return [path for path in there if not names or path.relative_to(within).as_posix() in names]


def is_tracked(folder: RunFolder) -> bool:
    """Tell whether git tracks a run, wherever that lies."""
    return bool(tracked_names(folder.path, "run.json"))


def tracked_runs() -> set[Path]:
    """Return the folders of the runs on file that git tracks; none without a repository."""
    manifests = tracked_names(results.RESULTS, "*/*/*/run.json")
    return {(results.RESULTS / name).parent for name in manifests}


def committed_runs() -> list[RunFolder]:
    """List the published runs, newest last."""
    manifests = (folder.path / "run.json" for folder in all_runs())
    return [RunFolder(path.parent) for path in tracked(manifests, results.RESULTS)]
