"""Models made and changed with torch, small enough for seconds; the unit tests need no torch.

Nor does whoever collects these tests: torch takes seconds to import, and `make test` collects all
tests in each of its processes.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)


class _WhenAsked:
    """Torch, which is imported when something of it is first asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("torch"), name)


torch: Any = _WhenAsked()


def made(
    make: Callable[..., dict[str, Any]], base: Path, out: Path, **given: object
) -> dict[str, Any]:
    """Have a maker fill a new folder; return the facts that it records."""
    out.mkdir()
    return make(base, out, **given)
