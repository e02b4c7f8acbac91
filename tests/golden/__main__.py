"""Plays the plan on the installed vLLM: prints what `python -m serving.simulator` does."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path

from serving.simulator.__main__ import main
from tests.golden.plays import plan

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sys.stdin = io.StringIO(plan(Path(folder)).model_dump_json() + "\n")
        main()
    os._exit(0)  # as the forecaster does
