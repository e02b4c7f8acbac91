"""Selects the runs that represent their machine in every table."""

from __future__ import annotations

from collections.abc import Iterable

from labs import LABS
from labs.harness.storage.checks import unreadable
from labs.harness.storage.committed import committed_runs
from labs.harness.storage.recorded import Run
from labs.harness.storage.results import RunFolder, all_runs


def newest_runs(quick: bool = False, committed: bool = False) -> list[RunFolder]:
    """List the newest complete, ordinary run of each lab on each machine, in the labs' order.

    GPUs come before CPUs. Where a lab has no other run, one with random weights takes its place and
    is marked as such; on a GPU, and with `quick` everywhere, a quick run does where there is no
    full one. With `committed`, only runs that git tracks count, and one that cannot be read raises
    DamagedError; a reader's own damaged run is skipped.
    """
    folders = committed_runs() if committed else (f for f in all_runs() if not unreadable(f))
    return newest_of(folders, quick)


def newest_of(folders: Iterable[RunFolder], quick: bool = False) -> list[RunFolder]:
    """Select from these folders, the newest last, as `newest_runs` does from those on file."""
    newest: dict[tuple[bool, str, str], RunFolder] = {}
    for folder in folders:
        run = folder.run()
        key = on_cpu(folder), run.machine.slug, run.lab["name"]
        current = newest.get(key)
        too_quick = run.quick and not quick and on_cpu(folder)
        if not folder.complete or run.ad_hoc or run.reproduces or too_quick:
            continue
        if current and _rank(run) < _rank(current.run()):
            continue
        newest[key] = folder
    order = {name: place for place, name in enumerate(LABS)}
    return [
        newest[key] for key in sorted(newest, key=lambda k: (*k[:2], order.get(k[2], len(order))))
    ]


def on_cpu(folder: RunFolder) -> bool:
    """Tell whether a run's machine is a CPU: sorted by this, GPUs come first."""
    return folder.run().machine.kind == "cpu"


def marks(run: Run) -> str:
    """Mark a run that is not an ordinary one: random weights, quick."""
    return (" (random weights)" if run.dummy else "") + (" (quick)" if run.quick else "")


def _rank(run: Run) -> tuple[bool, bool]:
    return not run.quick, not run.dummy
