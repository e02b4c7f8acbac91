"""The manifests of the published runs, the oldest included."""

from __future__ import annotations

from pathlib import Path

from labs.harness.storage import manifest
from labs.harness.storage.results import RunFolder
from tests.committed import in_git


def test_published_runs_load_whatever_was_recorded_then(committed: Path) -> None:
    """And a difference is not made of what one of them never recorded."""
    for name in in_git.runs():
        run = RunFolder(committed / "results" / name).run()
        richer = run.model_copy(update={"model_files": {"tokenizer.json": "0" * 64}})
        said = [manifest.facts(r) for r in (run, richer)]
        if not run.model_files:
            assert manifest.differences(*said) == []
            assert manifest.unrecorded(*said) == ["model.files"]
