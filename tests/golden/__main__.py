"""Plays the plan on the installed vLLM: prints what `python -m serving.forecasting` does."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from serving.forecasting.__main__ import main
from tests.golden.plays import plan


def let_a_cpu_schedule_asynchronously() -> None:
    """Leave asynchronous scheduling to the flags: vLLM turns it off on a CPU, and on on CUDA."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    check = platform.check_and_update_config

    def checked(config: Any) -> None:
        scheduler = config.scheduler_config
        asked_for = scheduler.async_scheduling
        check(config)
        scheduler.async_scheduling = asked_for

    platform.check_and_update_config = staticmethod(checked)


if __name__ == "__main__":
    let_a_cpu_schedule_asynchronously()
    with tempfile.TemporaryDirectory() as folder:
        sys.stdin = io.StringIO(plan(Path(folder)).model_dump_json() + "\n")
        main()
    os._exit(0)  # as the forecaster does
