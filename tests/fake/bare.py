"""The quiet `labs` command without what watches a run from outside: for tests that ask none of it.

There is no Prometheus, and the reference step takes as long each time, without a process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dashboards import prometheus
from serving.hardware import reference_step
from serving.hardware.reference_step import ReferenceStep, ReferenceTimer
from tests.fake import quiet


class ConstantTimer(ReferenceTimer):
    """A reference step on a machine whose speed never changes."""

    def __init__(self) -> None:
        pass

    def time(self) -> ReferenceStep:
        return ReferenceStep(reading_s=0.02, computing_s=0.01)


@contextmanager
def _started(kind: str, log: Path) -> Iterator[ReferenceTimer]:
    yield ConstantTimer()


def with_a_constant_reference_step() -> None:
    """In this process."""
    reference_step.started = _started


def app() -> None:
    """Run the command line, in a process of its own."""
    with_a_constant_reference_step()
    setattr(prometheus, "find_prometheus", lambda root: None)  # noqa: B010
    quiet.app()


if __name__ == "__main__":
    app()
