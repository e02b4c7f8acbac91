"""Our Locust, whose load workers share their core with a busy loop."""

from __future__ import annotations

import time

import gevent
from locust import events
from locust.env import Environment
from locust.runners import WorkerRunner

from loadtests.locustfile import ChatUser

__all__ = ["ChatUser"]  # Locust takes the users it finds here
BUSY_S, FREE_S = 0.06, 0.02


def _slow_down(environment: Environment, **_: object) -> None:
    if isinstance(environment.runner, WorkerRunner):
        gevent.spawn(_busy_loop)


def _busy_loop() -> None:
    while True:
        until = time.monotonic() + BUSY_S
        while time.monotonic() < until:
            pass
        gevent.sleep(FREE_S)


events.init.add_listener(_slow_down)
