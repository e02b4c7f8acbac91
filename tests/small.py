"""The `labs` command with smaller numbers of the product's own, for labs on a real engine.

How many answers a probe asks for, how many tasks it sets, how often a step is timed and how much
text is read for a forecast decide how sure a finding is, and not whether it can be made. What makes
forecasts, and engines, are forked from a process that has imported vLLM (`tests/with_vllm.py`). The
README's lab is run without it, as a reader runs it.
"""

from __future__ import annotations

from functools import partial

from labs.harness.analysis import evaluation
from labs.harness.analysis.probes import Probe
from labs.harness.cli.cli import app
from labs.harness.forecast import copied_text, forecaster, step_timing
from labs.many_samples import probes as many_samples
from labs.multi_lora import probes as multi_lora
from labs.structured_output import probes as structured_output
from labs.tiled_attention import probes as tiled_attention
from serving.engines import vllm
from tests import with_vllm

_tasks_with_shots = evaluation.tasks_with_shots


def _fewer_tasks() -> list[tuple[str, str, str]]:
    return _tasks_with_shots()[::4]


def make_small() -> None:
    """Make the numbers smaller in this process."""
    structured_output.PROBES["structures-quick"] = Probe(
        partial(structured_output.structures, each=1, timed=1)
    )
    multi_lora.PROBES["tenants-quick"] = Probe(partial(multi_lora.tenants, requests_sent=40))
    many_samples.TASK_TOKENS = 8
    evaluation.tasks_with_shots = _fewer_tasks
    setattr(step_timing, "QUICK_PASSES", 1)  # noqa: B010
    copied_text.ANSWERS = 8
    tiled_attention.ARGV = with_vllm.argv_of("tests.brief_attention")
    forecaster.FORECASTER_ARGV = with_vllm.argv_of("serving.simulator")
    vllm.PARSING = with_vllm.argv_of("serving.plugins.parsing")
    with_vllm.fork_engines()


if __name__ == "__main__":
    make_small()
    app()
