"""Gives machines the short names that `results/machines.toml` lists."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path

from labs.harness.storage import results
from serving.hardware.machine import Machine

FILE = "machines.toml"


def short_name(machine: Machine) -> str:
    """Name a machine on a page; one without a short name has that of its model."""
    return _names(results.RESULTS / FILE).get(machine.slug, machine.name)


def legend(machine: Machine) -> str:
    """Say what a machine is, behind its short name where it has one."""
    known = _names(results.RESULTS / FILE).get(machine.slug)
    return f"{known}: {machine.describe()}" if known else machine.describe()


@functools.cache
def _names(path: Path) -> dict[str, str]:
    return tomllib.loads(path.read_text()) if path.exists() else {}
