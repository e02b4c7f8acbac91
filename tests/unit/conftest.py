"""Every unit test sees other people's runs in the folder of results, and no committed one."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from labs.harness.storage import results
from labs.harness.storage.results import RunFolder
from tests.runs_of_others import runs_of_others
from tests.unit.builders import write_run

__all__ = ["runs_of_others"]


@pytest.fixture(scope="session", autouse=True)
def _commands_are_built_once() -> None:
    """`CliRunner` would build the whole tree of commands anew at every call."""
    import typer.main
    import typer.testing

    setattr(typer.testing, "_get_command", functools.cache(typer.main.get_command))  # noqa: B010


@pytest.fixture
def signals_as_found() -> Iterator[None]:
    """Put back the two signals that commands take over."""
    taken = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for signum, handler in taken.items():
        signal.signal(signum, handler)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run, the only one in the folder of results."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    return write_run(tmp_path)
