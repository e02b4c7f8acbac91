"""The models that labs derive from the one they serve, and these labs on a real vLLM.

The served one is a few layers of the bundled model, where its text does not matter. What is derived
from it is made as a quick run makes it, and is readable; the labs find it made. They run beside
those of `test_labs.py`, on the other core.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from labs import LABS
from labs.harness.plan import derived_models
from serving.hardware import machine
from serving.models import catalog
from tests import with_vllm
from tests.real import derived_for, lab_on_a_cpu, runs_beside, served, with_ceilings
from tests.sizes import sizes_of

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        machine.detect().kind != "cpu", reason="this machine has a GPU: see tests/gpu"
    ),
]
PROMPTS_EACH = 80  # of which a quick run trains on a share
HERE = [name for name in LABS if runs_beside(name)]


def derived_by_the_tests() -> list[tuple[str, int | None]]:
    """List what the labs derive in the sizes of the tests, and from how many layers."""
    found = [(made, sizes_of(name).layers) for name in LABS for made in derived_for(name)]
    return list(dict.fromkeys(found))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "layers"), derived_by_the_tests())
def test_a_derived_model_is_made(
    name: str, layers: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if derived_models.RECIPES[name].quick_share < 1:  # it is enough that they train at all
        monkeypatch.setattr(derived_models, "PROMPTS_EACH", PROMPTS_EACH)
    base = catalog.resolve(machine.detect(), served(layers))
    monkeypatch.setattr(derived_models, "MAKING", with_vllm.python("serving.models"))
    folder = derived_models.make(base, name, print, quick=True)
    facts = derived_models.about(folder)
    assert facts, "its maker records what it made"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_ceilings(tmp_path_factory.mktemp("results"))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("lab", HERE)
def test_lab_runs_on_a_real_engine(lab: str, results: Path) -> None:
    lab_on_a_cpu(lab, results, command="tests.swapped_cores")
