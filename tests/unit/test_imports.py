"""The import rule of the house, read from the source."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from labs import LABS

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "labs": {"labs", "serving", "loadtests", "dashboards"},
    "dashboards": {"dashboards", "serving", "loadtests"},
    "serving": {"serving"},
    "loadtests": {"loadtests"},
}
FILES = sorted(path for house in MAY_IMPORT for path in (ROOT / house).rglob("*.py"))
LAB_VOCABULARY = {
    "labs.lab", "labs.theory", "loadtests.arrivals", "loadtests.prompts", "loadtests.workload",
    "serving.metrics",
}  # fmt: skip


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Absolute module names; `from labs import theory` is labs.theory."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            module = node.module or ""
            inner = {f"{module}.{a.name}" for a in node.names}
            found |= inner if module in MAY_IMPORT else {module}
    return found


def at_module_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Everything that runs on import: function bodies do not."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from at_module_level(node)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    tree, house = ast.parse(path.read_text()), path.relative_to(ROOT).parts[0]
    everywhere = {name.split(".")[0] for name in imported(ast.walk(tree))}
    assert everywhere & MAY_IMPORT.keys() <= MAY_IMPORT[house]
    if path != ROOT / "loadtests" / "locustfile.py":
        assert not everywhere & {"locust", "gevent", "geventhttpclient"}
    on_import = {name.split(".")[0] for name in imported(at_module_level(tree))}
    assert not on_import & {"torch", "vllm", "transformers"}
    assert not {"utils", "common", "helpers", "misc"} & {path.stem, path.parent.name}


@pytest.mark.parametrize("lab", LABS)
def test_a_lab_file_speaks_the_lab_vocabulary_only(lab: str) -> None:
    tree = ast.parse((ROOT / "labs" / f"{lab.replace('-', '_')}.py").read_text())
    others = imported(ast.walk(tree)) - LAB_VOCABULARY
    assert {name.split(".")[0] for name in others} <= sys.stdlib_module_names
