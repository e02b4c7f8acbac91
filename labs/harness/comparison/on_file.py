"""A run on file as the generated pages name it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from labs.harness.analysis.computed import Summary
from labs.harness.reports.method import was_resumed
from labs.harness.reports.rendering import Told, told_by
from labs.harness.storage import manifest
from labs.harness.storage.machine_names import short_name
from labs.harness.storage.newest import marks, on_cpu
from labs.harness.storage.recorded import Run, Session
from labs.harness.storage.results import RunFolder


@dataclass(frozen=True)
class OnFile:
    """A run on file, read once."""

    folder: RunFolder

    @cached_property
    def run(self) -> Run:
        return self.folder.run()

    @cached_property
    def summary(self) -> Summary:
        return self.folder.summary()

    @cached_property
    def told(self) -> Told:
        return told_by(self.folder)

    @cached_property
    def session(self) -> Session | None:
        return self.folder.session()

    @property
    def resumed(self) -> bool:
        """Tell whether of its load only that of the last session is on file."""
        return bool(self.session and was_resumed(self.run, self.session))

    @property
    def lab(self) -> str:
        return self.folder.lab_name

    @property
    def machine(self) -> str:
        return short_name(self.run.machine)

    @property
    def home(self) -> Path:
        """The folder of its machine's results."""
        return self.folder.path.parent.parent

    @property
    def on_cpu(self) -> bool:
        return on_cpu(self.folder)

    @cached_property
    def is_stale(self) -> bool:
        """Tell whether the lab's settings have changed since."""
        return manifest.is_stale(self.run)

    @property
    def marks(self) -> str:
        return marks(self.run)

    @property
    def named(self) -> str:
        """Its lab, with its marks where it is quick; the table of runs has them all."""
        return f"{self.lab}{self.marks if self.run.quick else ''}"

    @property
    def standing(self) -> tuple[bool, bool, bool]:
        """What a page tells first is the least."""
        return self.is_stale, self.on_cpu, self.run.quick

    def report(self, page_folder: Path) -> str:
        """The address of its report from a page in that folder."""
        return os.path.relpath(self.folder.path / "report.md", page_folder)


@dataclass(frozen=True)
class StandsIn:
    """Which marks some runs have, whose meaning their page has to tell."""

    quick: bool
    random: bool

    @classmethod
    def of(cls, runs: Iterable[OnFile]) -> StandsIn:
        manifests = [of.run for of in runs]
        return cls(any(r.quick for r in manifests), any(r.dummy for r in manifests))
