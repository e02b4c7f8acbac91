"""Every lab on a real vLLM with a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest

from labs import LABS
from serving import machine
from tests.real import check_run, quick_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(machine.detect().kind != "gpu", reason="no CUDA device here"),
]


@pytest.mark.timeout(3600)  # a checkout's first run makes the models derived from the served one
@pytest.mark.parametrize("lab", LABS)
def test_lab_runs_on_a_real_engine(lab: str, tmp_path: Path) -> None:
    check_run(quick_run(lab, tmp_path))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("lab", [name for name in LABS if name != "quantization-tools"])
def test_lab_runs_on_random_weights(lab: str, tmp_path: Path) -> None:
    """Without a download; that one lab compares what tools make of real weights."""
    check_run(quick_run(lab, tmp_path, weights="dummy"))
