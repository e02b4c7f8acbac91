"""How the Python processes of the tests start."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.startup.sitecustomize import CORES, NO_COMPILER, SERVER, WORKER_APART


def test_a_server_of_vllm_forks_and_nothing_else_does() -> None:
    ask = "import multiprocessing; print(multiprocessing.get_context('spawn').get_start_method())"
    for argument, method in ((SERVER, "fork"), ("another", "spawn")):
        asked = [sys.executable, "-c", ask, argument]
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        assert said.strip() == method


@pytest.mark.parametrize(
    ("arguments", "disabled"),
    [
        ((SERVER, "--enforce-eager"), "1"),
        ((SERVER,), "None"),
        (("another", "--enforce-eager"), "None"),
    ],
)
def test_an_engine_with_eager_steps_compiles_nothing(
    arguments: tuple[str, ...], disabled: str
) -> None:
    asked = [sys.executable, "-c", f"import os; print(os.environ.get('{NO_COMPILER}'))", *arguments]
    output = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert output.strip() == disabled


@pytest.mark.parametrize(
    ("apart", "bound"), [("", [False, True, True]), ("1", [False] * 2 + [True])]
)
def test_the_process_with_the_worker_alone_keeps_to_its_cores(
    apart: str, bound: list[bool]
) -> None:
    """Of the server, its child and its grandchild: the core, and the worker that it may have."""
    ask = (
        "import os, sys\n"
        "for generation in range(3):\n"
        f"    print(os.environ['OMP_NUM_THREADS'], os.environ['{WORKER_APART}'],"
        " *os.sched_getaffinity(0), flush=True)\n"
        "    if (child := os.fork()):\n"
        "        os.waitpid(child, 0)\n"
        "        break\n"
    )
    here = sorted(os.sched_getaffinity(0))
    env = {**os.environ, CORES: str(here[0]), **({WORKER_APART: apart} if apart else {})}
    asked = [sys.executable, "-c", ask, SERVER]
    said = subprocess.run(asked, env=env, capture_output=True, text=True, check=True).stdout
    assert [line.split() for line in said.splitlines()] == [
        ["1", apart or "0", *map(str, here[:1] if one else here)] for one in bound
    ]
