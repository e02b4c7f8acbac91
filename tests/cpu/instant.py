"""An engine core that answers at once: vLLM's own scheduler, and no model behind it.

vLLM's engine core imports `InstantExecutor` by its name.
"""

from __future__ import annotations

import time
from typing import Any

from serving.simulator.step import Step
from serving.simulator.virtual_engine import Clock, VirtualExecutor

STEP_S = 0.02


class _TakesNothing:
    def seconds(self, step: Step) -> float:
        return 0.0


class InstantExecutor(VirtualExecutor):
    """Returns the tokens of a step after STEP_S, which it sleeps."""

    clock = Clock(_TakesNothing())  # type: ignore[arg-type]

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Sleep, and return the step's output, or what holds it."""
        time.sleep(STEP_S)
        return super().execute_model(scheduler_output, non_block)
