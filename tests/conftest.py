"""No test sees what its reader has set, recorded or run.

That is settings of the labs, of pytest, of git and of another make; the folder of results; the lock
of a run under way; and the data of `make watch`, with the Prometheus that may be up on them.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests import with_vllm
from tests.startup import sitecustomize

for name in tuple(os.environ):
    if name.startswith(("LABS_", "GIT_", "MAKE", "MFLAGS", "PYTEST_ADDOPTS")):
        del os.environ[name]
# The program reads these when it is imported; the folder goes when this process ends.
_scratch = tempfile.TemporaryDirectory(prefix="labs-tests-")
os.environ["LABS_RESULTS"] = f"{_scratch.name}/results"
os.environ["LABS_PROMETHEUS_DATA"] = f"{_scratch.name}/prometheus"
os.environ["LABS_SCRATCH"] = f"{_scratch.name}/scratch"
os.environ.setdefault(with_vllm.PLACE, f"{_scratch.name}/with-vllm")  # one for all processes
# what this process starts begins with the same module
_startup = str(Path(sitecustomize.__file__).parent)
_paths = [_startup, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, _paths)))

LONGEST = (
    "cpu/test_derived.py",
    "cpu/test_labs.py",
    "fake/test_run.py",
    "fake/test_faults.py",
    "fake/test_kills.py",
    "fake/test_reproduce.py",
    "cpu/test_random_weights.py",
    "committed/test_browser.py",
    "committed/test_site.py",
)
"""The files that take longest, in this order: `make test` gives each to the process that is free
next, and what takes long must not begin last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: the others are done beside them."""

    def place(item: pytest.Item) -> int:
        file = "/".join(item.path.parts[-2:])
        return LONGEST.index(file) if file in LONGEST else len(LONGEST)

    items.sort(key=place)
