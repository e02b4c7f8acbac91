"""The queries of the dashboards, as a Prometheus may be asked them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from dashboards import boards


def expressions(values: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield (dashboard, panel, query) with every variable replaced, to run against a Prometheus.

    The value of a drop-down that admits several is a regular expression, by default `.*`.
    """
    variables = {"__range": "1h", "__rate_interval": "1m", **values}

    def resolved(query: str) -> str:
        return re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match[1], ".*"), query)

    for board_json in boards.written().values():
        for panel in boards.panels(board_json):
            for target in panel["targets"]:
                yield board_json["title"], panel["title"], resolved(target["expr"])
        for annotation in board_json["annotations"].get("list", ()):
            if "expr" in annotation:
                yield board_json["title"], annotation["name"], resolved(annotation["expr"])
