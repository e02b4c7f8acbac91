"""The plan that a rehearsal prints first; `make doctor` prints it on a GPU."""

from labs.running.sitting_plan import Planned, plan, table

__all__ = ["Planned", "plan", "table"]
