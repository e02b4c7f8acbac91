"""The forecasts that the first results of a GPU will meet, written before any GPU has run a lab."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from labs import FIRST, LABS

PAGE = "results/forecasts-h100.md"
REMEDY = f"make forecast LAB={','.join(FIRST)} MACHINE=h100 QUICK=1 WEIGHTS=dummy OUT={PAGE}"


@pytest.mark.parametrize("name", FIRST)
def test_it_is_of_the_settings_that_such_a_session_runs_with(name: str, committed: Path) -> None:
    """They are in the name of the run's folder: a forecast of others would judge nothing."""
    lab = LABS[name].at("gpu-80", quick=True, dummy=True)
    section = rf"^## {re.escape(lab.title)}: .*?`(\w{{8}})`\.$"
    found = re.search(section, (committed / PAGE).read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{lab.title} has no forecast"
    assert found[1] == lab.digest(), REMEDY
