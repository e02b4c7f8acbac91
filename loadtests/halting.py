"""Halt the engines that have no turn, where requests go to several engines one after another."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence


@contextlib.contextmanager
def one_awake(engines: Sequence[Sequence[int]]) -> Iterator[Callable[[int], None]]:
    """Yield what wakes one engine, by its number, and suspends the others.

    `engines` has the pids of each one's processes, or nothing where they are not known or may not
    be suspended. When the block ends, all go on. A process that has ended is passed over, whoever
    has its pid then: each is held by a descriptor (pidfd_open(2), Linux 5.3).
    """
    with contextlib.ExitStack() as exits:
        held = [[*_held(pids, exits)] for pids in engines]
        exits.callback(_send, [*itertools.chain(*held)], signal.SIGCONT)

        def wake(number: int) -> None:
            for other, processes in enumerate(held):
                if other != number:
                    _send(processes, signal.SIGSTOP)
            _send(held[number], signal.SIGCONT)

        yield wake


def _held(pids: Sequence[int], exits: contextlib.ExitStack) -> Iterator[int]:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            process = os.pidfd_open(pid)
            exits.callback(os.close, process)
            yield process


def _send(processes: Sequence[int], sign: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, sign)
