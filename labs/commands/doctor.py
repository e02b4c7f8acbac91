"""What this machine has, what it lacks and how to mend that, and which labs can run: `make doctor`.

Nothing is started, measured or downloaded. vLLM's own parser reads every lab's engine flags, as
before a run.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import psutil
import requests

from labs import LABS
from labs.commands.interactive import PORT, WEB_PORT
from labs.filing.results import LEAST_FREE_BYTES, RESULTS, MachineFile, read_json
from labs.lab import Lab, LabError, NotApplicable
from labs.running import derived_models
from labs.running.resolve import (
    check_flags,
    is_dummy,
    model_of,
    require_compiler,
    require_devices,
    require_known_names,
    require_memory,
    require_sizes,
)
from serving import gpus, install, models, quantize, telemetry
from serving import machine as machines
from serving.engines.base import EngineError
from serving.machine import GIB, Machine
from serving.models import ROOT, Model, ModelError
from serving.platforms import PLATFORMS, platform_of
from serving.ports import PortTaken, require_port

PORTS = {"make serve": (PORT, "PORT"), "make locust": (WEB_PORT, "WEB_PORT")}
LEAST_FREE_SHARE = 0.9  # of a GPU's memory: what vLLM takes unless told otherwise


@dataclass(frozen=True)
class Line:
    """Something looked at: what was found, and what to do where it is amiss."""

    part: str
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Ability:
    """Can a lab run here: what it does first, or why it cannot; None where it does not apply."""

    lab: str
    able: bool | None
    note: str


def examine(wanted: str, weights: str = "") -> tuple[list[Line], list[Ability]]:
    """Everything about this machine, and every lab, with the model and weights a run would serve.

    Raises LabError for weights that are not known.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # a model that is not here is told, not fetched
    machine = machines.detect()
    vllm = _vllm(machine)
    model, about_model = _model(machine, wanted, weights)
    lines = [
        *_hardware(machine),
        *_software(machine),
        vllm,
        about_model,
        *_beside(machine),
    ]
    if vllm.mend:
        return lines, [Ability(name, False, "vLLM has to be mended first") for name in LABS]
    random = is_dummy(weights)
    return lines, [_ability(lab, machine, model, about_model, random) for lab in LABS.values()]


# ------------------------------------------------------------------------------------ the machine


def _hardware(machine: Machine) -> Iterator[Line]:
    yield Line("Machine", machine.describe())
    if machine.kind == "gpu":
        yield from _gpus()
    elif install.detect_platform() == "cuda":
        chosen = os.environ.get(gpus.VARIABLE)
        yield Line(
            "GPU",
            "there is an NVIDIA device, but its driver does not answer"
            if chosen is None
            else f"{gpus.VARIABLE}={chosen} leaves this process none",
            "see what `nvidia-smi -L` says; in a container, pass the GPU on (`--gpus all`)",
        )
    else:
        yield Line("GPU", "none with an NVIDIA driver: labs run on the CPU")
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(ROOT)
    yield Line("Memory", f"{memory.available / GIB:.0f} of {memory.total / GIB:.0f} GiB available")
    short = disk.free < LEAST_FREE_BYTES
    yield Line("Disk", f"{disk.free / GIB:.0f} GiB free here", "free some" if short else "")


def _gpus() -> Iterator[Line]:
    import pynvml

    pynvml.nvmlInit()
    for index, handle in enumerate(gpus.visible(pynvml)):
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        taken = memory.free < LEAST_FREE_SHARE * memory.total
        yield Line(
            f"GPU {index}",
            f"{pynvml.nvmlDeviceGetName(handle)}, {memory.free / GIB:.0f} of"
            f" {memory.total / GIB:.0f} GiB free, compute capability {major}.{minor}",
            "end what holds its memory (`nvidia-smi` lists it)" if taken else "",
        )
    driver, cuda = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlSystemGetCudaDriverVersion()
    built, known = _torch_cuda(), f"{cuda // 1000}.{cuda % 1000 // 10}"
    old = built is not None and cuda // 1000 < int(built.split(".")[0])
    yield Line(
        "Driver",
        f"{driver}, up to CUDA {known}",
        f"torch is built for CUDA {built}: install a driver for that" if old else "",
    )


def _torch_cuda() -> str | None:
    """The CUDA that torch is built for, read without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    about = Path(spec.origin).with_name("version.py")
    found = re.search(r"^cuda\b.*'(\d[\d.]*)'", about.read_text(), re.M) if about.exists() else None
    return found[1] if found else None


def _software(machine: Machine) -> Iterator[Line]:
    yield Line("Python", platform.python_version())
    version, cuda = _version("torch"), _torch_cuda()
    built = f"{version} for {f'CUDA {cuda}' if cuda else 'the CPU'}" if version else "missing"
    wrong = version is None or (machine.kind == "gpu" and cuda is None)
    yield Line("torch", built, _set_up(machine) if wrong else "")
    yield Line("Compiler", *machines.compiler(machine.kind))


def _vllm(machine: Machine) -> Line:
    ours = PLATFORMS[platform_of(machine.kind)].vllm
    if version := _version(ours):
        return Line("vLLM", f"{version} ({ours})")
    others = [p.vllm for p in PLATFORMS.values() if p.vllm != ours and _version(p.vllm)]
    found = f"{others[0]} {_version(others[0])}, the other platform's" if others else "missing"
    return Line("vLLM", found, _set_up(machine))


def _set_up(machine: Machine) -> str:
    setup = f"`make setup PLATFORM={platform_of(machine.kind)}`"
    return f"{setup}; without internet, `make bundle` elsewhere"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _model(machine: Machine, wanted: str, weights: str) -> tuple[Model | None, Line]:
    try:
        model = model_of(machine, wanted, weights)
    except ModelError as error:
        if not is_dummy(weights) and _hub_answers():
            return None, Line("Model", "not here yet: the first run downloads it")
        return None, Line("Model", "cannot be had here", str(error))
    size = f"{model.shape.params / 1e6:,.0f} M parameters{', random weights' * model.dummy}"
    return model, Line("Model", f"{model.name}, {size}, {model.shape.max_positions:,} positions")


@cache
def _hub_answers() -> bool:
    from huggingface_hub import constants

    try:
        return requests.head(constants.ENDPOINT, timeout=5).status_code < 500
    except requests.RequestException:
        return False


def _beside(machine: Machine) -> Iterator[Line]:
    program = install.find_prometheus(ROOT)
    yield Line(
        "Prometheus",
        str(program or "missing: runs go on without dashboards"),
        "" if program else "put `prometheus` and `promtool` on PATH",
    )
    read = telemetry.source(machine.kind)
    can = "can be read" if read else "cannot be read: no J/token"
    yield Line("Energy", f"{'NVML' if machine.kind == 'gpu' else 'RAPL'} {can}")
    for user, (port, setting) in PORTS.items():
        try:
            require_port(port, setting)
            yield Line(f"Port {port}", f"free ({user})")
        except PortTaken:
            yield Line(f"Port {port}", f"taken ({user})", f"{user} {setting}=<another>")
    path = RESULTS / machine.slug / "machine.json"
    if path.exists():
        ceilings = read_json(path, MachineFile).ceilings
        yield Line("Ceilings", f"measured {ceilings.measured_at[:10]}")
    else:
        yield Line("Ceilings", "not measured yet: the first lab does, in about 15 s")


# --------------------------------------------------------------------------------------- the labs


def _ability(
    lab: Lab, machine: Machine, model: Model | None, about_model: Line, random: bool
) -> Ability:
    if about_model.mend:
        return Ability(lab.name, False, "it has no model to serve")
    try:
        here = lab.at(models.scale_of(machine), quick=False, dummy=random)
        require_known_names(here)
        require_devices(here, machine)
        require_compiler(here, machine)
        check_flags(here)
        if model is None:
            return Ability(lab.name, True, "once the model is here")
        require_sizes(here, model)
        require_memory(here, machine, model)
        if random:
            for name in here.derived():
                derived_models.make(model, name, lambda _: None)  # in an instant, or refused
            return Ability(lab.name, True, "")
        missing = [n for n in here.derived() if not _there(model, n)]
    except NotApplicable as reason:
        return Ability(lab.name, None, str(reason))
    except (LabError, EngineError, ModelError) as error:
        return Ability(lab.name, False, str(error))
    known = models.SIBLINGS.get(model.name, {})
    published = known if known and _hub_answers() else {}
    made = [n for n in missing if n not in published]
    if unknown := [n for n in made if n not in derived_models.RECIPES]:
        why = f"for {model.name} no {', '.join(unknown)} is published, nor known how to make"
        return Ability(lab.name, False, why)
    methods = [m for n in made if (m := quantize.METHODS.get(derived_models.RECIPES[n].method))]
    if lacking := {m.tool.name for m in methods if not quantize.is_available(m.tool)}:
        why = (
            f"what makes its weights ({', '.join(sorted(lacking))}) is not set up here, and pip"
            " reaches no package index: see PIP_INDEX_URL, or measure speed with WEIGHTS=dummy"
        )
        return Ability(lab.name, False, why)
    minutes = sum(derived_models.RECIPES[name].minutes for name in made)
    notes = [f"makes {', '.join(made)} first (about {minutes:.0f} min)"] if made else []
    if fetched := [n for n in missing if n in published]:
        notes.append(f"downloads {', '.join(fetched)} first")
    return Ability(lab.name, True, "; ".join(notes))


def _there(model: Model, name: str) -> bool:
    if derived_models.place(model, name).exists():
        return True
    try:
        return models.sibling(model, name) is not None
    except ModelError:  # published, and not downloaded yet
        return False
