"""Random weights on a real vLLM, the shapes they are drawn for, and an engine's bad day.

They need no derived model, so they run beside the labs of `test_labs.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from labs.harness.spec.overrides import parse_changes
from serving import metrics
from serving.hardware import machine
from serving.models import catalog, dummy
from tests import with_vllm
from tests.real import BRIEF, check_run, quick_run, with_ceilings

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        machine.detect().kind != "cpu", reason="this machine has a GPU: see tests/gpu"
    ),
]


@pytest.mark.timeout(1800)  # beside the labs of other tests
def test_a_lab_runs_on_random_weights_and_says_so_first(tmp_path: Path) -> None:
    """On quantized ones: they are drawn in the worker, and what is not quantized is beside them."""
    settings = (
        f'{BRIEF} repeats=1 variants.base.weights=w8a8 workloads=["exponential"]'
        ' workloads.exponential.loads=["concurrent:1","concurrent:8","waves:8"]'
        " workloads.exponential.output_tokens.mean_tokens=4"
        " workloads.exponential.output_tokens.max_tokens=12"
    )
    results = with_ceilings(tmp_path)
    folder = quick_run(
        "continuous-batching", results, settings, weights="dummy", command="tests.small"
    )
    check_run(folder)
    run = folder.run()
    assert (run.model, run.dummy) == ("llama-tiny-dummy", True)
    assert run.changes == parse_changes(settings)  # random weights are no change of the lab
    for argv in run.argv.values():
        assert "--load-format" not in argv  # no setting of the lab's: the model brings it
    for _, _, trial in folder.trials(run.points(), run.rebuilt_lab()):
        assert trial
        assert trial.engine
        assert {"8", "16"} <= trial.engine.info[metrics.ZEROS].keys()
    report = (folder.path / "report.md").read_text()
    assert report.partition("\n")[0].endswith("with random weights")
    assert "quality is not measured" in report


def test_the_arithmetic_of_shapes_is_that_of_the_models_themselves() -> None:
    import torch
    import transformers

    for name in dummy.SHAPES:
        config = json.loads((dummy.HOME / f"{name}.json").read_text())
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.for_model(**config)
            )
        assert catalog.shape_of(config).params == sum(p.numel() for p in model.parameters())


def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    flags = json.dumps({"max-model-len": 8192, "kv-cache-memory-bytes": 2**20})
    words = str(catalog.bundled()), str(tmp_path / "engine.log"), flags
    argv = with_vllm.python("tests.one_engine", *words)
    started = subprocess.run(argv, capture_output=True, text=True)
    assert re.search(r"EngineError: .*exit code 1: ValueError: .*memory", started.stderr)
