"""Every unit test sees other people's runs in the folder of results, and no committed one."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator

import pytest

from tests.runs_of_others import runs_of_others

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
