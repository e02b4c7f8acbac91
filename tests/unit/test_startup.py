"""How the Python processes of the tests start."""

from __future__ import annotations

import gc
import subprocess
import sys

from tests.startup.sitecustomize import SERVER


def test_what_a_test_starts_collects_garbage_as_rarely_as_the_test() -> None:
    asked = [sys.executable, "-c", "import gc; print(*gc.get_threshold())"]
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert tuple(map(int, said.split())) == gc.get_threshold()
    assert gc.get_threshold()[0] > 10_000


def test_a_server_of_vllm_forks_and_nothing_else_does() -> None:
    ask = "import multiprocessing; print(multiprocessing.get_context('spawn').get_start_method())"
    for argument, method in ((SERVER, "fork"), ("another", "spawn")):
        asked = [sys.executable, "-c", ask, argument]
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        assert said.strip() == method
