"""Every unit test sees other people's runs in the folder of results, and no committed one.

Its disk has room, however full that of the machine is.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main
import typer.testing

from labs.commands import cli, options
from labs.filing import results
from serving.models import ROOT
from tests.unit.builders import write_run, write_runs_of_others

OUT_OF_BOUNDS = tuple(str(ROOT / name) + os.sep for name in ("results", "site"))


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Raise AssertionError where a test opens or lists what lies in the reader's own folders."""
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | Path):
        path = f"{arguments[0]}{os.sep}"  # a relative one may be in a folder that is removed
        assert not path.startswith(OUT_OF_BOUNDS), f"a unit test reads {path}"


sys.addaudithook(_refuse)


# `CliRunner` would build the whole tree of commands anew at every call, and a command would look
# through the options of all of them
setattr(typer.testing, "_get_command", functools.cache(typer.main.get_command))  # noqa: B010
setattr(cli, "settings_of", functools.cache(options.settings_of))  # noqa: B010


# what needs room asks for it beforehand, and most tests are not about that
setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1e12, used=0.0, free=1e12))  # noqa: B010


@pytest.fixture(scope="session", autouse=True)
def _runs_of_others() -> None:
    """A test that looks at the folder of results, and not at one of its own, sees these."""
    write_runs_of_others(write_run(results.RESULTS))


@pytest.fixture
def signals_as_found() -> Iterator[None]:
    """Put back the two signals that commands take over."""
    taken = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for signum, handler in taken.items():
        signal.signal(signum, handler)
