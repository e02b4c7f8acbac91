"""Check what this machine has and lacks, how to mend that, and which labs can run: `make doctor`.

Nothing is started, measured or downloaded. vLLM's own parser reads every lab's engine flags, as
before a run.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import psutil
import requests

from labs import LABS
from labs.harness.cli import all_labs
from labs.harness.cli.options import PORT
from labs.harness.plan import derived_models
from labs.harness.plan.resolve import (
    RunRequest,
    absent_engines,
    check_flags,
    is_dummy,
    model_for,
    model_of,
    require_compiler,
    require_devices,
    require_host_memory,
    require_known_names,
    require_memory,
    require_sizes,
)
from labs.harness.plan.session_plan import plan, table
from labs.harness.spec.lab import Lab, LabError, NotApplicable
from labs.harness.storage.bounded import read_json
from labs.harness.storage.recorded import MachineFile
from labs.harness.storage.results import RESULTS
from labs.harness.storage.writing import LEAST_FREE_BYTES
from serving.engines.base import EngineError
from serving.engines.vllm import MEMORY_SHARE
from serving.hardware import gpus, telemetry
from serving.hardware import machine as machines
from serving.hardware.gpus import GpuError
from serving.hardware.host_memory import available_bytes
from serving.hardware.machine import GIB, Machine
from serving.models import catalog, quantize
from serving.models.catalog import ROOT, Model, ModelError
from serving.packaging import install
from serving.places import PROGRAM
from serving.platforms import PLATFORMS, platform_of
from serving.processes.ports import PortTaken, require_port

START_S = 45.0  # of an engine on a GPU, assumed
SESSIONS_MIN = (30, 60, 120)


@dataclass(frozen=True)
class Check:
    """Says what state a part of the machine is in, and what to do where it is not well."""

    part: str
    state: str
    remedy: str = ""


@dataclass(frozen=True)
class Ability:
    """Says whether a lab can run here, and what it does first or why it cannot."""

    lab: str
    able: bool | None  # None where the lab does not apply to this machine
    note: str


def examine(wanted: str, weights: str = "") -> tuple[list[Check], list[Ability]]:
    """Check this machine and every lab, with the model and weights that a run would serve.

    Raises LabError for an unknown value of WEIGHTS.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # a model that is not here is reported, not downloaded
    try:
        machine, broken = machines.detect(), ""
    except GpuError as error:
        machine, broken = machines.cpu(), str(error)
    vllm = _vllm(machine)
    model, about_model = _model(machine, wanted, weights)
    lines = [
        *_hardware(machine, broken),
        *_software(machine),
        vllm,
        about_model,
        *_instruments(machine),
    ]
    if vllm.remedy:
        return lines, [
            Ability(name, False, "vLLM has to be installed first (see above)") for name in LABS
        ]
    random = is_dummy(weights)
    lab = next(iter(LABS.values()))
    sizes = [RunRequest(lab, quick, weights=weights) for quick in (False, True)]
    all_labs.check_flags(LABS, sizes, machine)  # at once: a parser takes long to import
    return lines, [
        _ability_in_its_shape(lab, machine, wanted, weights)
        if lab.shape
        else _ability(lab, machine, model, about_model, random)
        for lab in LABS.values()
    ]


# ------------------------------------------------------------------------------------ the machine


def _hardware(machine: Machine, broken: str = "") -> Iterator[Check]:
    """Check the hardware; `broken` says why a GPU that is to serve does not."""
    yield Check("Machine", machine.describe())
    if machine.kind == "gpu":
        yield from _gpus()
    elif broken:
        state, _, remedy = broken.partition(": ")
        yield Check("GPU", state, remedy)
    elif install.detect_platform() == "cuda":
        chosen = os.environ.get(gpus.VARIABLE)
        yield Check(
            "GPU",
            "there is an NVIDIA device, but its driver does not answer"
            if chosen is None
            else f"{gpus.VARIABLE}={chosen} hides every GPU from this process",
            "run `nvidia-smi -L`, which says why; a container needs `--gpus all`",
        )
    else:
        yield Check("GPU", "none with an NVIDIA driver: labs run on the CPU")
        if machine.lacks_bf16:
            yield Check("BF16", machines.IN_FLOAT32)
    total, disk = psutil.virtual_memory().total, shutil.disk_usage(ROOT)
    yield Check("Memory", f"{available_bytes() / GIB:.0f} of {total / GIB:.0f} GiB available")
    short = disk.free < LEAST_FREE_BYTES
    remedy = "free some disk space" if short else ""
    yield Check("Disk", f"{disk.free / GIB:.0f} GiB free here", remedy)


def _gpus() -> Iterator[Check]:
    import pynvml

    pynvml.nvmlInit()
    for number, why in gpus.silent(pynvml).items():
        state = f"number {number} does not answer ({why}); the others are used without it"
        yield Check("GPU", state, "`nvidia-smi` and the kernel's log (`dmesg`) say more")
    generations = set[int]()
    for index, handle in enumerate(gpus.visible(pynvml)):
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        except pynvml.NVMLError as error:
            remedy = f"name another GPU in {gpus.VARIABLE}"
            yield Check(f"GPU {index}", f"the driver does not tell its memory ({error})", remedy)
            continue
        generations.add(major)
        if (major, minor) < gpus.BF16_CAPABILITY:
            yield Check("BF16", "none on this GPU: vLLM serves in FP16")
        taken = memory.free < MEMORY_SHARE * memory.total
        yield Check(
            f"GPU {index}",
            f"{pynvml.nvmlDeviceGetName(handle)}, {memory.free / GIB:.0f} of"
            f" {memory.total / GIB:.0f} GiB free, compute capability {major}.{minor}",
            "end the processes that use its memory (`nvidia-smi` lists them)" if taken else "",
        )
        mode = gpus.compute_mode(pynvml, handle)
        if gpus.admits_one_process(mode):
            state = f"{mode}: runs do not time the machine's own speed beside the engine"
            yield Check("Compute mode", state)
        elif mode == "prohibited":
            yield Check("Compute mode", mode, "have an administrator run `nvidia-smi -c DEFAULT`")
    yield _cuda_compiler(generations)
    try:
        driver, cuda = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlSystemGetCudaDriverVersion()
    except pynvml.NVMLError as error:
        yield Check("Driver", f"it does not tell its version ({error})")
        return
    built, known = _torch_cuda(), f"{cuda // 1000}.{cuda % 1000 // 10}"
    old = built is not None and cuda // 1000 < int(built.split(".")[0])
    yield Check(
        "Driver",
        f"{driver}, supports CUDA up to {known}",
        f"torch is built for CUDA {built}: install a driver that supports it" if old else "",
    )


def _cuda_compiler(generations: set[int]) -> Check:
    """Say whether FlashInfer can compile kernels, and whether GPUs of these generations need it.

    A generation is a compute capability's first number: 8 is Ampere and Ada, 9 is Hopper. What each
    needs was found in vLLM 0.26 (docs/gpu.md).
    """
    part, path = "CUDA toolkit", machines.cuda_compiler()
    if path:
        return Check(part, f"{path}: FlashInfer can compile kernels with it")
    if 8 in generations:
        remedy = (
            "install it, or name its folder in CUDA_HOME; without it the other variants are"
            " measured, and on Ada SET=flags.attention-backend=TRITON_ATTN needs none"
        )
        return Check(part, "no nvcc: engines whose KV cache is in FP8 need FlashInfer's", remedy)
    if generations == {9}:
        not_used = "the labs turn off FlashInfer's sampler and autotuning, and DeepGEMM"
        return Check(part, f"no nvcc, and none is needed on Hopper: {not_used}")
    return Check(part, "no nvcc: where vLLM chooses FlashInfer's kernels, engines do not start")


def _torch_cuda() -> str | None:
    """Read the CUDA version that torch is built for, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version_file = Path(spec.origin).with_name("version.py")
    text = version_file.read_text() if version_file.exists() else ""
    match = re.search(r"^cuda\b.*'(\d[\d.]*)'", text, re.M)
    return match[1] if match else None


def _software(machine: Machine) -> Iterator[Check]:
    yield Check("Python", platform.python_version())
    version, cuda = _version("torch"), _torch_cuda()
    built = f"{version} for {f'CUDA {cuda}' if cuda else 'the CPU'}" if version else "missing"
    wrong = version is None or (machine.kind == "gpu" and cuda is None)
    yield Check("torch", built, _set_up(machine) if wrong else "")
    yield Check("Compiler", *machines.compiler(machine.kind))


def _vllm(machine: Machine) -> Check:
    wanted = PLATFORMS[platform_of(machine.kind)].vllm
    if version := _version(wanted):
        return Check("vLLM", f"{version} ({wanted})")
    other_builds = [p.vllm for p in PLATFORMS.values() if p.vllm != wanted and _version(p.vllm)]
    state = "missing"
    if other_builds:
        state = f"{other_builds[0]} {_version(other_builds[0])}, which is for the other platform"
    return Check("vLLM", state, _set_up(machine))


def _set_up(machine: Machine) -> str:
    setup = f"`make setup PLATFORM={platform_of(machine.kind)}`"
    return f"{setup}; without internet, `make bundle` on another machine"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _model(machine: Machine, wanted: str, weights: str) -> tuple[Model | None, Check]:
    try:
        model = model_of(machine, wanted, weights)
    except ModelError as error:
        if not is_dummy(weights) and _hub_answers():
            return None, Check("Model", "not downloaded yet: the first run downloads it")
        return None, Check("Model", "not available here", str(error))
    size = f"{model.shape.params / 1e6:,.0f} M parameters{', random weights' * model.dummy}"
    return model, Check("Model", f"{model.name}, {size}, {model.shape.max_positions:,} positions")


@cache
def _hub_answers() -> bool:
    try:
        from huggingface_hub import constants

        return requests.head(constants.ENDPOINT, timeout=5).status_code < 500
    except (ImportError, requests.RequestException):
        return False


def _instruments(machine: Machine) -> Iterator[Check]:
    program = install.find_prometheus(PROGRAM)
    yield Check(
        "Prometheus",
        str(program or "missing: labs run without the live dashboards"),
        "" if program else "install `prometheus` and `promtool`, on PATH",
    )
    read = telemetry.source(machine.kind)
    can = "can be read" if read else "cannot be read, so reports have no J/token"
    yield Check("Energy", f"{'NVML' if machine.kind == 'gpu' else 'RAPL'} {can}")
    try:
        require_port(PORT, "PORT")
        yield Check(f"Port {PORT}", "free (make serve)")
    except PortTaken:
        yield Check(f"Port {PORT}", "taken (make serve)", "make serve PORT=<another port>")
    path = RESULTS / machine.slug / "machine.json"
    if path.exists():
        ceilings = read_json(path, MachineFile).ceilings
        yield Check("Ceilings", f"measured {ceilings.measured_at[:10]}")
    else:
        yield Check("Ceilings", "not measured yet: the first lab measures them, in about 15 s")


# --------------------------------------------------------------------------------------- the labs


def _ability(
    lab: Lab, machine: Machine, model: Model | None, about_model: Check, random: bool
) -> Ability:
    if about_model.remedy:
        return Ability(lab.name, False, "there is no model to serve (see above)")
    try:
        resolved = lab.at(catalog.scale_of(machine), quick=False, dummy=random)
        require_known_names(resolved)
        require_devices(resolved, machine)
        require_compiler(resolved, machine)
        check_flags(resolved)
        if model is None:
            return Ability(lab.name, True, "after the model is downloaded")
        require_sizes(resolved, model)
        require_memory(resolved, machine, catalog.as_served(model, resolved.value_bytes))
        absent = absent_engines(resolved, machine, model)
        resolved = resolved.without(absent)
        require_host_memory(resolved)
        derived = resolved.derived()
        if random:
            for name in derived:
                if name not in derived_models.NEED_NO_WEIGHTS:
                    derived_models.make(model, name, lambda _: None)  # takes an instant, or raises
            derived = [name for name in derived if name in derived_models.NEED_NO_WEIGHTS]
        known = {} if random or resolved.made_here else catalog.SIBLINGS.get(model.name, {})
        missing = [n for n in derived if not _weights_available(model, n, known)]
    except NotApplicable as reason:
        return Ability(lab.name, None, str(reason))
    except (LabError, EngineError, ModelError) as error:
        return Ability(lab.name, False, str(error))
    published = known if known and _hub_answers() else {}
    to_make = [n for n in missing if n not in published]
    if why := _cannot_make(to_make, model):
        return Ability(lab.name, False, why)
    minutes = sum(derived_models.RECIPES[name].minutes for name in to_make)
    time = derived_models.MINUTES.format(max(1, round(minutes)))
    notes = [f"leaves out {', '.join(absent)}: {next(iter(absent.values()))}"] if absent else []
    notes += [f"makes {', '.join(to_make)} first ({time})"] if to_make else []
    if to_download := [n for n in missing if n in published]:
        notes.append(f"downloads {', '.join(to_download)} first")
    return Ability(lab.name, True, "; ".join(notes))


def _cannot_make(names: Sequence[str], model: Model) -> str:
    """Say why derived models cannot be made here; empty where they can."""
    if unknown := [n for n in names if n not in derived_models.RECIPES]:
        return f"no {', '.join(unknown)} is published for {model.name}, and this lab cannot make it"
    methods = [m for n in names if (m := quantize.METHODS.get(derived_models.RECIPES[n].method))]
    if lacking := {m.tool.name for m in methods if not quantize.is_available(m.tool)}:
        return (
            f"the tools that make its weights ({', '.join(sorted(lacking))}) are missing, and pip"
            " reaches no package index: set PIP_INDEX_URL, or measure speed with WEIGHTS=dummy"
        )
    return ""


def _ability_in_its_shape(lab: Lab, machine: Machine, wanted: str, weights: str) -> Ability:
    """Say whether a lab can run that serves random weights whatever the machine's model is."""
    resolved = lab.at(catalog.scale_of(machine), quick=False)
    try:
        model = model_for(resolved, machine, wanted, weights)
    except NotApplicable as reason:
        return Ability(lab.name, None, str(reason))
    except ModelError as error:
        return Ability(lab.name, False, str(error))
    return _ability(lab, machine, model, Check("Model", model.name), random=True)


# --------------------------------------------------------------------------------------- a session


def session(abilities: list[Ability]) -> str:
    """Plan quick runs of the labs that can run here, with random weights; "" without a GPU."""
    able = {a.lab for a in abilities if a.able}
    machine = machines.detect() if able else None
    if machine is None or machine.kind != "gpu":
        return ""
    names = [name for name in all_labs.chosen("", by_value=True) if name in able]
    planned = list(plan(names, catalog.scale_of(machine), START_S))
    fit = (f"{sum(p.ends_s <= 60 * m for p in planned)} labs in {m} minutes" for m in SESSIONS_MIN)
    return (
        f"{table(planned)}\nComputed, with {START_S:.0f} s for the start of an engine once the"
        f" first has compiled: {', '.join(fit)}."
    )


def _weights_available(model: Model, name: str, known: Mapping[str, str]) -> bool:
    if derived_models.is_made(derived_models.place(model, name), model):
        return True
    if name not in known:
        return False
    try:
        return catalog.sibling(model, name) is not None
    except ModelError:  # published, and not downloaded yet
        return False
