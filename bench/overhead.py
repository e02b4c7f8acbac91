"""The lab's own share of a run's time."""

from __future__ import annotations

from bench.console import aim, console, table
from labs.harness.filing import results
from labs.harness.telling import instruments
from serving.hardware import machine as machines


def measure() -> instruments.Overhead | None:
    """Read the newest complete run of this machine; None where there is none.

    Labs with probes do not count: the requests of probes take time that is in no trial.
    """
    machine = machines.detect().slug
    for folder in (f for f in reversed(results.all_runs()) if f.path.parent.parent.name == machine):
        session = folder.session()
        if folder.complete and session and not (folder.run().quick or folder.run().lab["probes"]):
            break
    else:
        console.print(
            "Lab overhead: no complete run of this machine on file (a lab without probes, not"
            " QUICK=1)."
        )
        return None
    share = overhead_share(session.wall_s, session.engine_start_s, session.load_s)
    times_table = table(
        f"Where a run's time goes: {folder.path.parent.name}, {folder.path.name}",
        *("whole", "engine start", "load", "the lab itself", "share"),
    )
    own_s = session.wall_s - session.engine_start_s - session.load_s
    times = (session.wall_s, session.engine_start_s, session.load_s, own_s)
    times_table.add_row(*(f"{t:.1f} s" for t in times), f"{share:.1%}")
    console.print(times_table)
    aim("the lab's own share of a run", 100 * share, 10.0, "%")
    return instruments.Overhead(lab=folder.path.parent.name, share=share)


def overhead_share(wall_s: float, engine_start_s: float, load_s: float) -> float:
    """Compute the share of a run that is neither engine start nor load."""
    return (wall_s - engine_start_s - load_s) / wall_s
