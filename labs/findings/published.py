"""What others published of what the labs try: shown beside a lab's own figures, never judged.

A report names a figure with its setting and whose it is, so that a reader sees ours, what theory
says and theirs. Models, hardware and loads are theirs, given as far as they are known here. It is
no part of a resolved lab: a word more here makes no result stale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Part = Literal["claims", "forecasts", "findings"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A figure as others published it."""

    figure: str
    setting: str = ""  # as far as it is known
    source: str

    def __str__(self) -> str:
        setting = f", {self.setting}" if self.setting else ""
        return f"{self.figure}{setting} ({self.source})"


PublishedFigures = Mapping[Part, Mapping[str, Sequence[Published]]]
"""Kind of a lab's part -> the part's name -> what was published of it."""

ONE_STREAM = (
    Published(
        figure="155 tok/s",
        setting="70 % of the bandwidth, one stream, 8B in BF16 on one H100",
        source="vLLM",
    ),
    Published(
        figure="158 tok/s",
        setting="71 % of the bandwidth, one stream, 8B in BF16 on one H100",
        source="SGLang",
    ),
    Published(figure="78 % of the bandwidth", setting="one stream, 1B", source="Hazy megakernel"),
    Published(figure="85 % of the bandwidth", setting="one stream, RTX 4090", source="TinyChat"),
)
"""Of decode for one request alone."""
