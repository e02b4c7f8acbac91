"""Find the unfinished run to continue.

The trials of one run are compared with one another, so all of them have to be measured the same
way. A run is continued only if nothing in its manifest has changed since.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from labs.harness.spec.lab import LabError
from labs.harness.storage import manifest
from labs.harness.storage.bounded import DamagedError
from labs.harness.storage.manifest import Fact
from labs.harness.storage.recorded import Run
from labs.harness.storage.results import RESULTS, RunFolder

# A file that is only added to git changes this; the commit and the settings are compared.
NO_DIFFERENCE = ("environment.git_dirty",)


class CannotResume(LabError):
    """An unfinished run was measured otherwise; the message names the difference."""


def unfinished(now: Run) -> RunFolder | None:
    """Return the newest unfinished run of these settings; `now` is the manifest of a new one.

    None where there is none. Raises CannotResume where there are some and each was measured
    otherwise.
    """
    candidates = [(folder, _differences(run, now)) for folder, run in _candidates(now)]
    for folder, differences in candidates:
        if not differences:
            return folder
    if not candidates:
        return None
    folder, differences = candidates[0]
    change = manifest.likeliest_cause(differences, ("then", "now"))
    raise CannotResume(
        f"the unfinished run {folder.path} cannot be continued, because its trials would not be"
        f" comparable: {change}. Restore that, or start a new run without RESUME=1"
    )


def _candidates(now: Run) -> Iterator[tuple[RunFolder, Run]]:
    """Yield this machine's unfinished runs with the same settings, the newest first."""
    home = RESULTS / now.machine.slug / now.lab["name"]
    for path in sorted(home.glob(f"*-{now.digest}/run.json"), reverse=True):
        folder = RunFolder(path.parent)
        with contextlib.suppress(DamagedError):
            run = folder.run()
            same = (run.digest, run.reproduces) == (now.digest, now.reproduces)
            if same and not folder.complete:
                yield folder, run


def _differences(then: Run, now: Run) -> list[Fact]:
    facts = manifest.differences(manifest.facts(then), manifest.facts(now))
    prices = [str(run.usd_per_hour or "none") for run in (then, now)]
    price = Fact(what="PRICE_PER_HOUR", a=prices[0], b=prices[1])
    different = [fact for fact in facts if fact.what not in NO_DIFFERENCE]
    return [*different, price] if price.differs else different
