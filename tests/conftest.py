"""What holds for every test: what it does not see, and who shares a process with whom.

No test sees what its reader has set, recorded or run: settings of the labs, of pytest, of git and
of another make; the folder of results; the lock of a run under way; and the data of `make watch`,
with the Prometheus that may be up on them.
"""

from __future__ import annotations

import os
import tempfile

import pytest

for name in tuple(os.environ):
    if name.startswith(("LABS_", "GIT_", "MAKE", "MFLAGS", "PYTEST_ADDOPTS")):
        del os.environ[name]
# The program reads these when it is imported; the folder goes when this process ends.
_scratch = tempfile.TemporaryDirectory(prefix="labs-tests-")
os.environ["LABS_RESULTS"] = f"{_scratch.name}/results"
os.environ["LABS_PROMETHEUS_DATA"] = f"{_scratch.name}/prometheus"
os.environ["LABS_SCRATCH"] = f"{_scratch.name}/scratch"


@pytest.hookimpl(tryfirst=True)  # before xdist's own hook, which reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Name the group of each test, which one process runs where `make test` starts several.

    Tests on real engines are one group: two at a time would compete for the cores that an engine is
    bound to, or for the GPU. The tests of any other file share what that file's fixtures start.
    """
    for item in items:
        real = item.get_closest_marker("cpu") or item.get_closest_marker("gpu")
        item.add_marker(pytest.mark.xdist_group("engine" if real else str(item.path)))
