"""Our Locust with an exporter that does nothing: the CPU time it saves is what recording costs."""

from __future__ import annotations

from collections.abc import Callable

from loadtests import locustfile
from loadtests.locustfile import ChatUser

__all__ = ["ChatUser"]  # Locust takes the users it finds here


class Nothing:
    """An exporter whose every method does nothing."""

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_: None


locustfile.Exporter = Nothing  # type: ignore[assignment, attr-defined]
