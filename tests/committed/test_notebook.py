"""The notebook docs/read_a_run.ipynb: its code runs, and finds what the report found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from serving.models.catalog import ROOT

NOTEBOOK = ROOT / "docs" / "read_a_run.ipynb"


def test_the_notebook_reads_a_published_run(
    committed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Cell after cell, in the folder where Jupyter would run them."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").symlink_to(committed / "results")
    monkeypatch.chdir(tmp_path / "docs")
    monkeypatch.setattr(plt, "show", lambda: None)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
    drawn = [line.get_xydata() for axis in plt.gcf().axes for line in axis.lines]
    plt.close("all")
    assert [np.shape(values)[0] for values in drawn] == [len(names["users"])] * 2
    assert names["by_hand"] == pytest.approx(names["reported"], rel=0.01)
    assert "by hand" in capsys.readouterr().out
