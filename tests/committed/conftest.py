"""The committed runs, as git keeps them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.committed import in_git


@pytest.fixture(scope="session")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """README.md and results/ as git keeps them; read only. Skips where this is no checkout."""
    if not in_git.runs():
        pytest.skip("git knows no run here")
    home = tmp_path_factory.mktemp("committed")
    in_git.write_out(home)
    return home
