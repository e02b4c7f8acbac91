"""Calls back at absolute times of the monotonic clock."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import heapq
import itertools
import math
import os
import time
from collections.abc import Callable


class Alarm:
    """Calls back at absolute monotonic times, a few tens of microseconds late on an idle core.

    A timerfd, because the event loops' own timers count in milliseconds.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._libc = ctypes.CDLL(None)
        self._fd: int = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK)
        self._spec = (ctypes.c_long * 4)()  # interval s, ns; value s, ns
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._armed = math.inf
        loop.add_reader(self._fd, self._ring)

    def at(self, when: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (when, next(self._order), call))
        if when < self._armed:
            self._arm(when)

    def _arm(self, when: float) -> None:
        self._armed = when
        self._spec[2], self._spec[3] = divmod(int(when * 1e9), 10**9)
        self._libc.timerfd_settime(self._fd, 1, self._spec, None)  # 1: TFD_TIMER_ABSTIME

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # armed anew since the loop saw it expire
            os.read(self._fd, 8)
        self._armed = -math.inf  # whatever the calls ask for is armed once, below
        now, due = time.monotonic(), []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap)[2])
        for call in due:  # collected first: a server that is behind still gets to its sockets
            call()
        self._armed = math.inf
        if self._heap:
            self._arm(self._heap[0][0])
