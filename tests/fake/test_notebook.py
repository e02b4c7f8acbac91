"""The notebook for a rented GPU: its cells clone, run the lab and show its report.

In the place of the set-up stands what a bundle brings, and in that of vLLM the fake engine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from serving.hardware import gpus
from serving.models.catalog import CACHE, ROOT
from tests.fake.conftest import Reader
from tests.sizes import sizes_of

NOTEBOOK = ROOT / "docs" / "gpu_notebook.ipynb"
LAB = "continuous-batching"


def test_its_cells_lead_from_a_clone_to_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = ROOT.as_uri()
    if subprocess.run(["git", "ls-remote", repository], capture_output=True).returncode:
        pytest.skip("this is no clone of a repository")
    reader, shown = Reader(tmp_path / "reader"), list[str]()
    notebook = ModuleType("IPython.display")
    setattr(notebook, "HTML", str)  # noqa: B010
    setattr(notebook, "display", shown.append)  # noqa: B010
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", notebook)
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "RESULTS": tmp_path / "inference-serving-lab" / "results",
        "SCRATCH": reader.scratch,
        "DISTURBED": "keep",  # other tests run meanwhile
        "ENGINE_COMMAND": reader.engine_command((), ()),
        "SET": f"{sizes_of(LAB).fake} repeats=1",
    }.items():
        monkeypatch.setenv(f"LABS_{name}", str(value))
    monkeypatch.setenv(gpus.VARIABLE, "")
    install, run, show = (
        "".join(cell["source"])
        for cell in json.loads(NOTEBOOK.read_text())["cells"]
        if cell["cell_type"] == "code"
    )
    names: dict[str, Any] = {}
    monkeypatch.setattr(subprocess, "Popen", as_from_a_bundle(tmp_path / "inference-serving-lab"))
    exec(install.replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}"), names)
    # measuring the machine's ceilings takes 15 s
    shutil.copytree(reader.results, names["LAB"] / "results", dirs_exist_ok=True)
    exec(run, names)
    exec(show, names)
    assert "report.md" in capsys.readouterr().out
    (page,) = shown
    assert names["report"].parent.name in unescape(page)
    assert len(reader.engine_starts()) > 0


def as_from_a_bundle(clone: Path) -> type[subprocess.Popen[str]]:
    """A `Popen` before whose first command the clone gets the commands of a bundle."""

    class Popen(subprocess.Popen[str]):
        def __init__(self, command: Any, *words: Any, **options: Any) -> None:
            labs = clone / ".unbundled" / "bin" / "labs"
            if clone.exists() and not labs.exists():
                labs.parent.mkdir(parents=True)
                (clone / ".cache").symlink_to(CACHE)  # with the model
                places = f"{ROOT}:{os.environ['PYTHONPATH']}"
                program = f'{sys.executable} -m tests.fake.quiet "$@"'
                labs.write_text(f"#!/bin/sh\nPYTHONPATH={places} exec {program}\n")
                labs.chmod(0o755)
            super().__init__(command, *words, **options)

    return Popen
