"""The import rule of the house, read from the source."""

import ast
import functools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from labs import LABS
from tests.cases import each

ROOT = Path(__file__).resolve().parents[2]
HOUSES = ("bench", "labs", "dashboards", "serving", "loadtests")
FOLDERS = {lab.replace("-", "_") for lab in LABS}
ROOMS = {path.parent.name for path in (ROOT / "labs" / "harness").glob("*/__init__.py")}
FILES = sorted(path for house in HOUSES for path in (ROOT / house).rglob("*.py"))
IN_LOCUST = {  # its processes alone: Locust and gevent patch the one that imports them
    f"loadtests/{module}.py"
    for module in ("connection", "load", "locustfile", "master", "streaming", "worker")
}
LAB_VOCABULARY = {
    "labs.harness.spec.declare",
    "labs.harness.spec.lab",
    "labs.harness.spec.theory",
    "loadtests.arrivals",
    "loadtests.prompts",
    "loadtests.structures",
    "loadtests.workload",
    "serving.simulator.step",
    "serving.metrics",
}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(parsed(path)))


@functools.cache
def imported_by(path: Path) -> frozenset[str]:
    """What a file imports, on import or later."""
    return frozenset(imported(nodes_of(path)))


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Absolute module names; `from labs.harness.spec import theory` is labs.harness.theory."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            module = node.module or ""
            inner = {f"{module}.{a.name}" for a in node.names}
            is_package = ROOT.joinpath(*module.split(".")).is_dir()
            found |= inner if is_package else {module}
    return found


def at_module_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Everything that runs on import: function bodies do not."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from at_module_level(node)


@each("path", FILES)
def test_imports_go_one_way(path: Path) -> None:
    tree = parsed(path)
    everywhere = {name.split(".")[0] for name in imported_by(path)}
    assert "tests" not in everywhere
    if str(path.relative_to(ROOT)) not in IN_LOCUST:
        assert not everywhere & {"locust", "gevent", "geventhttpclient"}
    if path.name in ("virtual_engine.py", "engine_model.py"):
        return  # their processes drive vLLM's own scheduler and model; no other imports them
    on_import = {name.split(".")[0] for name in imported(at_module_level(tree))}
    assert not on_import & {"torch", "vllm", "transformers"}
    assert not {"utils", "common", "helpers", "misc"} & {path.stem, path.parent.name}


def names_on_import(tree: ast.Module) -> Iterator[str]:
    """What is imported, by its whole name: `from scipy import stats` is scipy.stats."""
    for node in at_module_level(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def on_start(start: str) -> dict[Path, ast.Module]:
    """The files of this house that are imported with a module, itself included."""
    found: dict[Path, ast.Module] = {}
    names = [start]
    while names:
        module = names.pop().split(".")
        paths = (ROOT.joinpath(*module[:end]).with_suffix(".py") for end in (None, -1))
        path = next((p for p in paths if p.exists()), None)
        if path and path not in found:
            found[path] = parsed(path)
            names += imported(at_module_level(found[path]))
    return found


def test_a_command_that_draws_nothing_imports_no_library_of_plots_or_statistics() -> None:
    """They take two thirds of its start. `import scipy` alone loads each part at its first use."""
    probes = (path.parent.name for path in (ROOT / "labs").glob("*/probes.py"))
    starts = ("labs.harness.cli.cli", *(f"labs.{folder}.probes" for folder in probes))
    files = {path: tree for start in starts for path, tree in on_start(start).items()}
    assert ROOT / "labs" / "harness" / "analysis" / "verdicts.py" in files
    for path, tree in files.items():
        names = [*names_on_import(tree)]
        assert not [name for name in names if name.startswith(("matplotlib", "scipy."))], path


PACKAGES = {
    ROOT / "serving": (
        "plugins", "processes", "hardware", "packaging", "models", "engines", "simulator",
    ),
    ROOT / "labs" / "harness": (
        "spec", "analysis", "storage", "derived", "plan", "forecast", "reports", "runner",
        "comparison", "site", "cli",
    ),
}  # fmt: skip
"""From the bottom up: each imports from itself and those before it."""


@pytest.mark.parametrize("folder", PACKAGES, ids=str)
def test_a_package_imports_those_below_it(folder: Path) -> None:
    order, home = PACKAGES[folder], folder.relative_to(ROOT).parts
    assert {*order} <= {path.parent.name for path in folder.glob("*/__init__.py")}
    for path in FILES:
        package = path.relative_to(folder).parts[0] if path.is_relative_to(folder) else ""
        if package in order:
            names = (name.split(".") for name in imported_by(path))
            inside = {name[len(home)] for name in names if name[:-1][: len(home)] == [*home]}
            assert inside & {*order} <= {*order[: order.index(package) + 1]}, path


def room_of(parts: Sequence[str]) -> str:
    """`harness/analysis` of `labs.harness.analysis.verdicts`; outside its packages the house."""
    house, inner, room = (*parts, "", "")[:3]
    if house == "labs" and inner == "harness":
        return f"harness/{room}" if room in ROOMS else "harness"
    return "a_lab" if inner in FOLDERS else house


def imports_between_rooms() -> set[tuple[str, str]]:
    """(importer, imported), without those that follow from others."""
    edges = set()
    for path in FILES:
        importer = room_of(path.relative_to(ROOT).parts)
        names = [name.split(".") for name in imported_by(path)]
        rooms = {room_of(name) for name in names if name[0] in HOUSES}
        edges |= {(importer, room) for room in rooms if room != importer}

    def reaches(start: str, goal: str) -> bool:
        return (start, goal) in edges or any(
            reaches(room, goal) for importer, room in edges if importer == start
        )

    return {
        (start, goal)
        for start, goal in edges
        if not any(reaches(room, goal) for importer, room in edges if importer == start)
    }


def test_the_picture_of_the_architecture_is_the_code() -> None:
    """An import against its arrows closes a circle, and is an arrow that the picture lacks."""
    picture = (ROOT / "docs" / "architecture.md").read_text()
    assert set(re.findall(r"^    (\S+) --> (\S+)$", picture, re.M)) == imports_between_rooms()


@pytest.mark.parametrize("lab", LABS)
def test_a_lab_file_speaks_the_lab_vocabulary_only(lab: str) -> None:
    others = imported_by(ROOT / "labs" / lab.replace("-", "_") / "lab.py") - LAB_VOCABULARY
    assert {name.split(".")[0] for name in others} <= sys.stdlib_module_names


MACHINERY = [
    path
    for path in FILES
    if path != ROOT / "labs" / "__init__.py"
    and path.parent.name not in FOLDERS
    and path.relative_to(ROOT).parts[0] != "bench"  # which measures with a lab of its choice
]
NAMED = re.compile(rf"(?<![\w-])(?:lab-)?(?:{'|'.join(LABS)})(?![\w-])")

ITS_OWN_FLAG = {ROOT / "serving" / "engines" / "transformers.py": "continuous-batching"}


@each("path", MACHINERY)
def test_machinery_knows_no_lab(path: Path) -> None:
    """Neither by its module nor by its name, so that the next lab needs no change here."""
    froms = (node for node in nodes_of(path) if isinstance(node, ast.ImportFrom))
    inner = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
    names = [name.split(".") for name in imported_by(path) | inner]
    assert not [name for name in names if name[0] == "labs" and FOLDERS & {*name[1:2]}]
    values = (node.value for node in nodes_of(path) if isinstance(node, ast.Constant))
    texts = [text for text in values if isinstance(text, str)]
    if flag := ITS_OWN_FLAG.get(path):  # of an engine, which a lab happens to be called after
        texts = [text.replace(flag, "") for text in texts]
    assert not [text for text in texts if NAMED.search(text)]


WRITES_DOWN_A_MOMENT = {  # modules that do nothing else with the wall clock, which may jump
    "bench/__main__.py",
    "labs/harness/storage/writing.py",
    "labs/harness/runner/run.py",
    "loadtests/load.py",
    "serving/hardware/machine.py",
}


def test_the_wall_clock_is_read_only_to_write_down_a_moment() -> None:
    reads = re.compile(r"\btime\.time(_ns)?\(|\bdatetime\.now\(")
    reading = {str(path.relative_to(ROOT)) for path in FILES if reads.search(path.read_text())}
    assert reading == WRITES_DOWN_A_MOMENT
