"""Labs on a real vLLM, the bundled model and a real Prometheus.

Those for which models are made from it first are in `test_derived.py`, with some others, and are
run beside these.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from labs import LABS
from serving.engines import DEFAULT_ENGINE, vllm
from serving.engines.base import EngineError
from serving.engines.flags import Flags
from serving.engines.vllm import Vllm
from serving.engines.vllm_flags import PARALLEL
from serving.hardware import gpus, machine
from serving.models import catalog
from tests import with_vllm
from tests.real import in_sizes_for_a_cpu, lab_on_a_cpu, runs_beside
from tests.sizes import sizes_of

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        machine.detect().kind != "cpu", reason="this machine has a GPU: see tests/gpu"
    ),
]
# many engines first: what takes long must not begin last, nor beside those of `test_derived.py`
HERE = sorted(
    (name for name in LABS if not runs_beside(name)),
    key=lambda name: -len(LABS[name].variants),
)


def test_vllm_accepts_every_scale_of_every_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    """First of all: the runs below need not ask the parser again.

    One wrong value is among them: it alone is refused, in vLLM's words.
    """
    monkeypatch.setattr(vllm, "PARSING", with_vllm.python("serving.plugins.parsing"))
    scales = ["cpu", catalog.CPU_FP32, "gpu", *(f"gpu-{c.gb}" for c in gpus.CLASSES)]
    resolved = [
        lab.at(at, quick=False, dummy=random)
        for lab in LABS.values()
        for at in scales
        for random in (False, True)
    ]
    resolved += [in_sizes_for_a_cpu(name) for name in LABS if not sizes_of(name).not_real]
    several: Flags = {f: 2 for f in PARALLEL} | {"distributed-executor-backend": "ray"}
    on_vllm = [(r, v) for r in resolved for v in r.variants if v.engine == DEFAULT_ENGINE]
    right = [several, *(r.flags_of(v) for r, v in on_vllm)]
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


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("lab", HERE)
def test_lab_runs_on_a_real_engine(lab: str, results: Path) -> None:
    lab_on_a_cpu(lab, results)
