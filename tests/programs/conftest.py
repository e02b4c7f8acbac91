"""Every test here sees other people's runs in the folder of results, and no committed one."""

from __future__ import annotations

from tests.runs_of_others import runs_of_others

__all__ = ["runs_of_others"]
