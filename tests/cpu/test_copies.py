"""A lab on two copies of the model behind one API server: data parallelism on a real vLLM."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from serving import metrics
from serving.hardware import machine
from tests.real import BRIEF, quick_run, served, with_ceilings
from tests.shallow import LAYERS

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        machine.detect().kind != "cpu", reason="this machine has a GPU: see tests/gpu"
    ),
]
ONE_LOAD = (
    'repeats=1 most_repeats=0 workloads=["fixed"] workloads.fixed.loads=["concurrent:4"]'
    " workloads.fixed.prompt_tokens.tokens=64 workloads.fixed.output_tokens.tokens=8"
)


@pytest.mark.timeout(900)  # beside the labs of other tests
def test_a_lab_runs_on_two_copies_of_the_model(tmp_path: Path) -> None:
    """Both start, and what client, engine and Prometheus counted is the same."""
    folder = quick_run(
        "continuous-batching",
        with_ceilings(tmp_path),
        f"{BRIEF} {ONE_LOAD}",
        model=served(LAYERS),
        command="tests.small",
        copies=2,
    )
    run, session = folder.run(), folder.session()
    assert folder.complete
    assert session
    (trial,) = [trial for _, _, trial in folder.trials(run.points(), run.rebuilt_lab())]
    assert trial
    assert not trial.failed
    assert trial.engine
    for record in trial.records:
        assert record.output_tokens == record.asked_tokens
    for counted in session.agreement:
        assert counted.records > 0
        assert counted.engine == counted.records
        assert counted.prometheus in (counted.records, None)
    log = (folder.path / "logs" / "engine-base.log").read_text()
    assert {"EngineCore_DP0", "EngineCore_DP1"} <= set(re.findall(r"\((EngineCore_DP\d) ", log))
    assert metrics.CACHE_CONFIG in trial.engine.info
    assert "several copies" in {caveat.name for caveat in folder.summary().caveats}
