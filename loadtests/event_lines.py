"""What the load generator says to what started it: events, as JSON lines on its output."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any


def say(**event: object) -> None:
    """Write an event, as a JSON line on the standard output, to what started this process."""
    print(json.dumps(event), flush=True)


def events_of(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Read what a Locust of ours says, among the lines that Locust prints by itself."""
    for line in lines:
        if line.startswith('{"event"'):
            yield json.loads(line)
