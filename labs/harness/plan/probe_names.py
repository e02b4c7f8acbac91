"""The names of the probes that a lab may ask for; `labs.harness.runner.probes` has what they do."""

from __future__ import annotations

from itertools import product

READING = ("quality", "tenants", "structures", "greedy", "votes", "steps", "retrieval")
QUICK = "-quick"  # behind the name of a probe's short form


def _both(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(f"{name}{form}" for name, form in product(names, ("", QUICK)))


TEXT = _both(READING)
"""Probes that read text: random weights write none, so these probes refuse them."""
ALL = TEXT | _both(("salt", "joining"))
