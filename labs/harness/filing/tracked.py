"""Ask git which files it tracks, in folders that may come from anybody."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


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
