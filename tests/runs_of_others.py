"""Other people's runs in the folder of results, and nothing of what lies in the reader's own.

The tests of the program's parts (`tests/unit`) and of the programs that it starts
(`tests/programs`) see these runs, and no committed one. Their disk has room, however full that of
the machine is. Nothing of the program is imported before the first test: the process that gives
the tests out to others runs none.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
OUT_OF_BOUNDS = tuple(str(ROOT / name) + os.sep for name in ("results", "site"))


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Raise AssertionError where a test opens or lists what lies in the reader's own folders."""
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | Path):
        path = f"{arguments[0]}{os.sep}"  # a relative one may be in a folder that is removed
        assert not path.startswith(OUT_OF_BOUNDS), f"a test reads {path}"


sys.addaudithook(_refuse)


# what needs room asks for it beforehand, and most tests are not about that
setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1e12, used=0.0, free=1e12))  # noqa: B010


@functools.cache  # a process may run tests of both folders
def write() -> None:
    """Write the runs into the folder of results of these tests."""
    from labs.harness.storage import results
    from tests.unit.builders import write_run, write_runs_of_others

    write_runs_of_others(write_run(results.RESULTS))


@pytest.fixture(scope="session", autouse=True)
def runs_of_others() -> None:
    """A test that looks at the folder of results, and not at one of its own, sees these."""
    write()
