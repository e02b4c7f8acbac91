"""Every lab on a real vLLM with a CUDA device; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from labs import LABS
from serving import machine, models, quantize
from tests.real import ROUNDED, check_run, quick_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(machine.detect().kind != "gpu", reason="no CUDA device here"),
]
BUNDLED = {  # lab -> SET, by which a GPU's sizes fit the bundled model's 8,192 positions
    "continuous-batching": "",
    "prefix-caching": "",
    "speculative-decoding": "",
    "chunked-prefill": "",
    "kv-quantization": "flags.max-model-len=8192 workloads.far.prompt_tokens.tokens=7168"
    " workloads.far.prefix.tokens=7104",
    "weight-quantization": ROUNDED,
    "multi-lora": "",
    "single-stream": "",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all of them: the machine's ceilings are measured once."""
    return tmp_path_factory.mktemp("results")


@pytest.mark.timeout(3600)  # a checkout's first run makes the models derived from the served one
@pytest.mark.parametrize("lab", BUNDLED)
def test_lab_runs_on_a_real_engine(lab: str, results: Path) -> None:
    if lab == "weight-quantization" and not quantize.is_available(quantize.LLM_COMPRESSOR):
        pytest.skip("llm-compressor is not set up here, and pip reaches no package index")
    check_run(quick_run(lab, results, BUNDLED[lab], model=models.BUNDLED))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("lab", [name for name in LABS if name != "quantization-tools"])
def test_lab_runs_on_random_weights(lab: str, results: Path) -> None:
    """That one lab compares what tools make of real weights, and it takes long to set them up."""
    check_run(quick_run(lab, results, weights="dummy"))
