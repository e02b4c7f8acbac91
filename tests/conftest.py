"""No test sees what its reader has set, recorded or run.

That is settings of the labs, of pytest, of git and of another make; the folder of results; the lock
of a run under way; and the data of `make watch`, with the Prometheus that may be up on them.
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

FIRST = ("test_labs.py", "test_derived.py")  # labs on real engines, and what they wait for


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: the others are done beside them."""
    items.sort(key=lambda item: item.path.name not in FIRST)
