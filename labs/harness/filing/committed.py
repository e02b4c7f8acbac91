"""Tells which results git tracks: pages that are generated from results include no others.

A reader's own runs lie in the same folders as the published ones; `git add` publishes a run.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from labs.harness.filing import results
from labs.harness.filing.results import RunFolder, all_runs
from labs.harness.filing.tracked import tracked_names


def tracked(paths: Iterable[Path], within: Path) -> list[Path]:
    """Keep those of the paths, all of them below `within`, that git tracks.

    Where git tracks nothing there (no git, an archive without a repository, a folder elsewhere),
    all paths are kept.
    """
    if not (there := list(paths)):
        return []  # git need not be asked
    names = set(tracked_names(within))
    return [path for path in there if not names or path.relative_to(within).as_posix() in names]


def committed_runs() -> list[RunFolder]:
    """List the published runs, newest last."""
    manifests = (folder.path / "run.json" for folder in all_runs())
    return [RunFolder(path.parent) for path in tracked(manifests, results.RESULTS)]
