"""Every lab on a real vLLM with a CUDA device; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from labs import LABS
from serving.hardware import machine
from serving.models import catalog, quantize
from tests.real import check_run, quick_run
from tests.sizes import sizes_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(machine.detect().kind != "gpu", reason="no CUDA device here"),
]
REAL = [lab for lab in LABS if not sizes_of(lab).not_real]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all of them: the machine's ceilings are measured once."""
    return tmp_path_factory.mktemp("results")


@pytest.mark.timeout(3600)  # a checkout's first run makes the models derived from the served one
@pytest.mark.parametrize("lab", REAL)
def test_lab_runs_on_a_real_engine(lab: str, results: Path) -> None:
    sizes = sizes_of(lab)
    if sizes.needs and not quantize.is_available(sizes.needs):
        pytest.skip(f"{sizes.needs.name} is not set up here, and pip reaches no package index")
    model = "" if LABS[lab].shape else catalog.BUNDLED
    check_run(quick_run(lab, results, f"{sizes.real} {sizes.gpu}", model=model))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("lab", REAL)
def test_lab_runs_on_random_weights(lab: str, results: Path) -> None:
    check_run(quick_run(lab, results, weights="dummy"))
