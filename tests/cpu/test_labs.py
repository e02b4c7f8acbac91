"""Every lab on a real vLLM, the bundled model and a real Prometheus; and an engine's bad days."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from labs import LABS
from labs.running.resolve import require_compiler
from serving import dummy, gpus, machine, models
from serving.engines.base import EngineError
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
    """First of all: the runs below need not ask the parser again, which takes seconds to import."""
    scales = ["cpu", "gpu", *(f"gpu-{c.gb}" for c in gpus.CLASSES)]
    resolved = [
        lab.at(at, quick=False, dummy=random)
        for lab in LABS.values()
        for at in scales
        for random in (False, True)
    ]
    several = {f: 2 for f in PARALLEL} | {"distributed-executor-backend": "ray"}
    Vllm.check_flags([several, *(r.flags_of(v) for r in resolved for v in r.variants)])


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


@pytest.mark.timeout(600)
def test_a_lab_runs_on_random_weights_and_says_so_first(results: Path) -> None:
    folder = quick_run("weight-quantization", results, weights="dummy")
    check_run(folder)
    run = folder.run()
    assert (run.model, run.dummy, run.ad_hoc) == ("llama-tiny-dummy", True, False)
    for argv in run.argv.values():
        assert "--load-format" not in argv  # no setting of the lab's: the model brings it
    report = (folder.path / "report.md").read_text()
    assert report.partition("\n")[0].endswith("with random weights")
    assert "quality is not measured on random weights" in report
    assert not list(folder.path.glob("probes/*"))


def test_the_arithmetic_of_shapes_is_that_of_the_models_themselves() -> None:
    import torch
    import transformers

    for name in dummy.SHAPES:
        config = json.loads((dummy.HOME / f"{name}.json").read_text())
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.for_model(**config)
            )
        assert models.shape_of(config).params == sum(p.numel() for p in model.parameters())


def test_a_misspelled_flag_is_named_with_its_neighbour() -> None:
    with pytest.raises(EngineError, match="--enable-prefix-caching"):
        Vllm.check_flags([{"enable-prefix-cachin": True}])


def test_a_wrong_value_is_refused_in_vllms_words() -> None:
    with pytest.raises(EngineError, match=r"kv-cache-dtype.*fp9"):
        Vllm.check_flags([{"kv-cache-dtype": "fp9"}])


@pytest.fixture
def impossible(tmp_path: Path) -> Iterator[Vllm]:
    model = models.resolve(machine.detect())
    flags = {"max-model-len": 8192, "kv-cache-memory-bytes": 2**20, "enforce-eager": True}
    starting = Vllm("small", model, flags, kind="cpu", log=tmp_path / "engine.log")
    yield starting
    starting.stop()


def test_an_engine_that_cannot_start_says_why(impossible: Vllm) -> None:
    with pytest.raises(EngineError, match=r"exit code 1: ValueError: .*memory"):
        impossible.wait()
