"""Every lab on a real vLLM, the bundled model and a real Prometheus."""

from __future__ import annotations

from pathlib import Path

import pytest

from labs import LABS
from labs.running.resolve import require_compiler
from serving import gpus, machine
from serving.engines.base import EngineError, Flags
from serving.engines.vllm import PARALLEL, Vllm
from tests.real import check_dashboards, check_run, quick_run
from tests.sizes import sizes_of

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        machine.detect().kind != "cpu", reason="this machine has a GPU: see tests/gpu"
    ),
]


BRIEF = "warmup_s=0.5 window_s=2"


def test_vllm_accepts_every_scale_of_every_lab() -> None:
    """First of all: the runs below need not ask the parser again, which takes seconds to import.

    For the same reason one wrong value is among them: it alone is refused, in vLLM's words.
    """
    scales = ["cpu", "gpu", *(f"gpu-{c.gb}" for c in gpus.CLASSES)]
    resolved = [
        lab.at(at, quick=False, dummy=random)
        for lab in LABS.values()
        for at in scales
        for random in (False, True)
    ]
    several: Flags = {f: 2 for f in PARALLEL} | {"distributed-executor-backend": "ray"}
    right = [several, *(r.flags_of(v) for r in resolved for v in r.variants)]
    with pytest.raises(EngineError, match=r"kv-cache-dtype.*fp9"):
        Vllm.check_flags([*right, {"kv-cache-dtype": "fp9"}])
    Vllm.check_flags(right)


def test_a_misspelled_flag_is_named_with_its_neighbour() -> None:
    with pytest.raises(EngineError, match="--enable-prefix-caching"):
        Vllm.check_flags([{"enable-prefix-cachin": True}])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all of them: the machine's ceilings are measured once."""
    return tmp_path_factory.mktemp("results")


def labs_with_nothing_derived_first() -> list[str]:
    """Order the labs so that what others derive is made beside them, by `test_derived.py`."""
    return sorted(LABS, key=lambda name: bool(LABS[name].derived()))


@pytest.mark.timeout(3600)  # they may wait for the models derived from the served one
@pytest.mark.parametrize("lab", labs_with_nothing_derived_first())
def test_lab_runs_on_a_real_engine(lab: str, results: Path) -> None:
    sizes = sizes_of(lab)
    if sizes.not_real:
        pytest.skip(sizes.not_real)
    try:
        require_compiler(LABS[lab], machine.detect())
    except EngineError as error:
        pytest.skip(str(error))
    folder = quick_run(lab, results, f"{BRIEF} {sizes.real} {sizes.cpu}")
    check_run(folder)
    check_dashboards(folder)
