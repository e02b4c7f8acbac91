"""The names of what a run is made of, as its files have them.

A point is `variant/workload/load`, a pair of points that are compared `treatment|baseline`, and a
trial `variant/workload/load/repeat`. Files and tables hold the text; whoever needs a part reads it
here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class PointName:
    """Names a point by its variant, its workload and its load."""

    variant: str
    workload: str
    load: str

    def __str__(self) -> str:
        return f"{self.variant}/{self.workload}/{self.load}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `variant/workload/load`. Raises ValueError for anything else."""
        variant, workload, load = text.split("/")
        return cls(variant, workload, load)

    @property
    def parts(self) -> tuple[str, str, str]:
        """The three parts, in order."""
        return self.variant, self.workload, self.load


@dataclass(frozen=True)
class PairName:
    """Names two points that are compared."""

    treatment: str
    baseline: str

    def __str__(self) -> str:
        return f"{self.treatment}|{self.baseline}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `treatment|baseline`. Raises ValueError for anything else."""
        treatment, baseline = text.split("|")
        return cls(treatment, baseline)


@dataclass(frozen=True)
class TrialName:
    """Names one repeat of a point."""

    point: str
    repeat: int

    def __str__(self) -> str:
        return f"{self.point}/{self.repeat}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `variant/workload/load/repeat`. Raises ValueError for anything else."""
        point, _, repeat = text.rpartition("/")
        return cls(point, int(repeat))
