"""How the Python processes of the tests start."""

from __future__ import annotations

import gc
import subprocess
import sys


def test_what_a_test_starts_collects_garbage_as_rarely_as_the_test() -> None:
    asked = [sys.executable, "-c", "import gc; print(*gc.get_threshold())"]
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert tuple(map(int, said.split())) == gc.get_threshold()
    assert gc.get_threshold()[0] > 10_000
