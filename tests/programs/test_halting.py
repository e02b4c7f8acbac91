"""Of engines whose requests take turns, one is awake at a time."""

import itertools
import time
from collections.abc import Iterator

import psutil
import pytest

from loadtests.halting import one_awake

PATIENCE_S = 10.0  # a bound, not a measurement


@pytest.fixture
def engines() -> Iterator[list[list[psutil.Popen]]]:
    """Two of two processes each, and one whose processes are not known."""
    pairs = [[psutil.Popen(["sleep", "600"]) for _ in range(2)] for _ in range(2)]
    yield [*pairs, []]
    for process in itertools.chain(*pairs):
        if process.returncode is None:
            process.kill()
            process.wait()


def halted(engines: list[list[psutil.Popen]]) -> list[set[bool]]:
    return [{p.status() == psutil.STATUS_STOPPED for p in pair} for pair in engines]


def until_halted(engines: list[list[psutil.Popen]], expected: list[set[bool]]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while halted(engines) != expected:
        assert time.monotonic() < deadline, f"{halted(engines)}, not {expected}"
        time.sleep(0.01)


def test_one_engine_is_awake_at_a_time_and_all_are_at_the_end(
    engines: list[list[psutil.Popen]],
) -> None:
    with one_awake([[p.pid for p in pair] for pair in engines]) as wake:
        until_halted(engines, [{False}, {False}, set()])
        wake(1)
        until_halted(engines, [{True}, {False}, set()])
        wake(0)
        until_halted(engines, [{False}, {True}, set()])
        wake(2)
        until_halted(engines, [{True}, {True}, set()])
    until_halted(engines, [{False}, {False}, set()])


def test_processes_that_have_ended_are_passed_over(engines: list[list[psutil.Popen]]) -> None:
    """Before, and meanwhile."""
    pids = [[p.pid for p in pair] for pair in engines]
    (gone, other), pair, _ = engines
    gone.kill()
    gone.wait()
    with one_awake(pids) as wake:
        other.kill()
        other.wait()
        wake(1)
        wake(0)
        until_halted([pair], [{True}])


def test_engines_of_unknown_processes_are_left_alone() -> None:
    with one_awake([(), ()]) as wake:
        wake(1)


def test_all_go_on_where_the_load_is_broken_off(engines: list[list[psutil.Popen]]) -> None:
    def break_off() -> None:
        with one_awake([[p.pid for p in pair] for pair in engines]) as wake:
            wake(1)
            until_halted(engines, [{True}, {False}, set()])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    until_halted(engines, [{False}, {False}, set()])
