"""Our Locust, whose load workers stand still again and again, as where others have their core."""

from __future__ import annotations

import gevent
import gevent.monkey
from locust import events
from locust.env import Environment
from locust.runners import WorkerRunner

from loadtests.locustfile import ChatUser

__all__ = ["ChatUser"]  # Locust takes the users it finds here
STILL_S, FREE_S = 0.06, 0.02
stand_still = gevent.monkey.get_original("time", "sleep")  # of the whole process


def _slow_down(environment: Environment, **_: object) -> None:
    if isinstance(environment.runner, WorkerRunner):
        gevent.spawn(_stand_still)


def _stand_still() -> None:
    while True:
        stand_still(STILL_S)
        gevent.sleep(FREE_S)


events.init.add_listener(_slow_down)
