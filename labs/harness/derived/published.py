"""Show published figures beside a lab's own; no verdict depends on them.

A report names a figure with its setting and its source, so that a reader can compare the measured,
the predicted and the published figure. Models, hardware and loads are the publisher's, given as far
as they are known. They are no part of a resolved lab: a change here makes no result stale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Part = Literal["claims", "forecasts", "findings"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """Quotes a figure with its setting and its source."""

    figure: str
    setting: str = ""  # as far as it is known
    source: str

    def __str__(self) -> str:
        setting = f", {self.setting}" if self.setting else ""
        return f"{self.figure}{setting} ({self.source})"


PublishedFigures = Mapping[Part, Mapping[str, Sequence[Published]]]
"""Maps the kind of a lab's part, then the part's name, to what was published of it."""
