"""The machine: its hardware, and the ceilings that every prediction starts from.

The ceilings are measured on the serving device with the threads the engine will have:

- memory bandwidth: a copy far larger than the caches, bytes read plus bytes written per second
  (the STREAM "copy" convention, McCalpin 1995);
- BF16 rate: the best of a few square matrix products, 2 n^3 floating-point operations each;
  FP8 likewise (E4M3, scaled, fast accumulation) where the GPU has it, and float32 where a CPU has
  no instructions for BF16 and the labs serve in float32;
- on a GPU also the link to the host's memory: a copy from pinned memory there, bytes per second.

`python -m serving.hardware.machine` prints them as JSON; torch is imported only there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import psutil
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt

from serving.hardware import gpus
from serving.hardware.gpus import GpuError
from serving.platforms import PLATFORMS
from serving.processes.masking import recordable
from serving.processes.process import Process

GIB = 2**30
MEASURING = (sys.executable, "-m", "serving.hardware.machine")
VLLM = tuple(platform.vllm for platform in PLATFORMS.values())  # packages that carry it


IN_FLOAT32 = (
    "the models are in BF16, and this CPU has no instructions for it: vLLM serves them in float32,"
    " which takes twice the memory, and far less time for prompts and batches"
)
SLOW_BF16 = (
    "this CPU has no instructions for BF16, in which this run serves the model: prompts and larger"
    " batches take several times as long as in float32"
)


class Machine(BaseModel, frozen=True, extra="forbid"):
    """A machine's hardware; software is not part of it, so a driver update changes nothing."""

    kind: Literal["cpu", "gpu"]
    model: str
    count: PositiveInt  # logical CPUs, or GPUs
    memory_bytes: PositiveInt  # host memory, or one GPU's
    caches_bytes: dict[str, int] = {}
    cpu_flags: tuple[str, ...] = ()  # the matrix extensions vLLM's CPU kernels choose between
    # whether its GPUs are parts of one (MIG, vGPU); None on a CPU, and before it was recorded
    parts: Annotated[bool | None, Field(exclude_if=lambda parts: parts is None)] = None

    @property
    def lacks_bf16(self) -> bool:
        """Whether it is an x86 CPU without instructions for BF16, in which the labs' models are.

        It would multiply in software. On an EPYC with AVX2 alone a prompt of 512 tokens took 6.4
        times as long as in float32, a step of 16 requests 3.5 times and one of a single request 0.8
        times, since that reads half the bytes. Labs serve in float32 there: `models.scale_of`.
        """
        known, ends = "avx2" in self.cpu_flags, "_bf16"
        return known and not any(flag.endswith(ends) for flag in self.cpu_flags)

    @property
    def lacks_avx512(self) -> bool:
        """Whether it is an x86 CPU with AVX2 and without AVX-512."""
        return "avx2" in self.cpu_flags and "avx512f" not in self.cpu_flags

    @property
    def core_caches_bytes(self) -> dict[str, int]:
        """The caches that each core has to itself, by level: `L1` (data), `L1i` and `L2`."""
        return {level: size for level, size in sorted(self.caches_bytes.items()) if level < "L3"}

    @property
    def slug(self) -> str:
        """A readable name and a hash of the hardware, e.g. `intel-xeon-processor-2cpu-1a2b3c`.

        A hypervisor gives CPUs of several generations one name, which a core's own caches tell
        apart. L3 is not counted: cores share it, and a virtual machine may see another part of it.
        """
        words = re.sub(r"\((r|tm)\)|@.*|\b(cpu|gpu)\b", " ", self.model.lower())
        name = "-".join(re.findall(r"[a-z0-9.]+", words))[:40].strip("-.")
        memory_gib = round(self.memory_bytes / GIB)
        key = f"{self.kind}|{self.model}|{self.count}|{memory_gib}|{self.cpu_flags}"
        if self.core_caches_bytes:
            key += f"|{self.core_caches_bytes}"
        return f"{name}-{self.count}{self.kind}-{hashlib.sha256(key.encode()).hexdigest()[:6]}"

    @property
    def name(self) -> str:
        """Its model, and of a CPU what tells it from others that bear the same name."""
        without = " without BF16" if self.lacks_bf16 else ""
        caches = [
            self.caches_bytes[level] // 2**10
            for level in ("L1", "L1i")
            if level in self.caches_bytes
        ]
        l1 = f" (L1 {' + '.join(map(str, caches))} KiB)" if caches else ""
        return f"{self.model}{without}{l1}"

    def describe(self) -> str:
        """Its name, how many there are and their memory, in a phrase."""
        unit = "GPU" if self.kind == "gpu" else "logical CPU"
        plural = "s" if self.count > 1 else ""
        return f"{self.name}, {self.count} {unit}{plural}, {self.memory_bytes / GIB:.0f} GiB"


class Ceilings(BaseModel, frozen=True, extra="forbid"):
    """The measured limits of the serving device; a forecast for another may take a datasheet's."""

    memory_bandwidth_bytes_per_s: PositiveFloat
    bf16_flops_per_s: PositiveFloat  # or of FP16, on a GPU that has no BF16
    fp8_flops_per_s: PositiveFloat | None = None  # where the device multiplies FP8
    # of a CPU without instructions for BF16, in whose place labs serve in float32
    fp32_flops_per_s: Annotated[
        PositiveFloat | None, Field(exclude_if=lambda rate: rate is None)
    ] = None
    # from the host's memory to a GPU; not known of a CPU, nor of a GPU measured without it
    host_bytes_per_s: Annotated[
        PositiveFloat | None, Field(exclude_if=lambda rate: rate is None)
    ] = None
    threads: PositiveInt
    torch: str
    measured_at: str
    # the devices that these are the limits of together, each with a link of its own
    devices: Annotated[PositiveInt, Field(exclude_if=lambda number: number == 1)] = 1

    @property
    def ridge_flops_per_byte(self) -> float:
        """The arithmetic intensity where memory and compute take equally long (Williams 2009)."""
        return self.flops_per_s / self.memory_bandwidth_bytes_per_s

    @property
    def flops_per_s(self) -> float:
        """The rate in the type in which labs serve weights that are not quantized."""
        return self.fp32_flops_per_s or self.bf16_flops_per_s

    @property
    def link_bytes_per_s(self) -> float:
        """The rate from the host's memory: measured, or by the specification of PCIe 4.0 x16."""
        return self.host_bytes_per_s or self.devices * gpus.PCIE_4_BYTES_PER_S

    def times(self, devices: int) -> Ceilings:
        """Return the limits of several such devices that share the work of each layer."""
        rates = (
            "memory_bandwidth_bytes_per_s",
            "bf16_flops_per_s",
            "fp8_flops_per_s",
            "fp32_flops_per_s",
            "host_bytes_per_s",
        )
        known = {name: rate for name in rates if (rate := getattr(self, name))}
        update = {name: devices * rate for name, rate in known.items()}
        return self.model_copy(update={**update, "devices": devices * self.devices})


class Environment(BaseModel, frozen=True, extra="forbid"):
    """The software on the machine; where it changed between two runs, the report says so."""

    python: str
    packages: dict[str, str]
    kernel: str
    driver: str | None = None
    git_commit: str | None = None
    git_dirty: bool | None = None
    engine_cores: tuple[int, ...] = ()
    client_cores: tuple[int, ...] = ()
    cuda: str | None = None  # what the driver supports
    compute_mode: str | None = None  # of the first GPU: which processes may compute on it
    clocks: dict[str, str] = {}
    numa: dict[str, str] = {}  # node -> its cores
    variables: dict[str, str] = {}  # environment variables that the engine reads, without secrets
    load_average: float | None = None  # over the last minute

    @property
    def vllm(self) -> str | None:
        return self.version_of(VLLM)

    def version_of(self, distributions: Sequence[str]) -> str | None:
        """Return the version of the first of these packages that is installed."""
        return next((self.packages[name] for name in distributions if name in self.packages), None)


def detect() -> Machine:
    """Describe the NVIDIA GPUs that this process may use, by the first one; else the CPU.

    Raises GpuError where a GPU is to serve and does not answer.
    """
    return _gpu() or cpu()


def _gpu() -> Machine | None:
    import pynvml

    handles, why = [], f"{gpus.VARIABLE} names none that is here"
    try:
        pynvml.nvmlInit()
        handles = gpus.visible(pynvml)
    except pynvml.NVMLError as error:
        why = str(error)
    if not handles and _is_for_gpus() and not gpus.hidden():
        raise GpuError(
            f"the vLLM that is installed here is for NVIDIA GPUs, and none answers ({why}):"
            " `nvidia-smi -L` says more, and a container needs `--gpus all`; to go on without a GPU"
            f" set {gpus.VARIABLE} to nothing, and install the CPU's vLLM with PLATFORM=cpu"
        )
    if not handles:
        return None
    try:
        return Machine(
            kind="gpu",
            model=pynvml.nvmlDeviceGetName(handles[0]),
            count=len(handles),
            memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handles[0]).total),
            parts=gpus.is_part(pynvml, handles[0]),
        )
    except pynvml.NVMLError as error:
        raise GpuError(
            f"the driver does not tell the name and the memory of the first GPU ({error}), by which"
            f" a lab is sized: name another one in {gpus.VARIABLE}, or none to use the CPU"
        ) from error


def _is_for_gpus() -> bool:
    """Tell whether the vLLM that is installed is the build for NVIDIA GPUs."""
    try:
        return "cpu" not in metadata.version(PLATFORMS["cuda"].vllm)  # as vLLM itself tells
    except metadata.PackageNotFoundError:
        return False


def cpu() -> Machine:
    """Describe the CPU."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    flags = re.search(r"flags\s*:\s*(.+)", cpuinfo)
    extensions = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind = ((index / f).read_text().strip() for f in ("level", "type"))
        size = re.fullmatch(r"(\d+)([KM]?)", (index / "size").read_text().strip())
        if size:
            caches[f"L{level}{'i' if kind == 'Instruction' else ''}"] = (
                int(size[1])
                * {
                    "": 1,
                    "K": 2**10,
                    "M": 2**20,
                }[size[2]]
            )
    return Machine(
        kind="cpu",
        model=name[1].strip() if name else platform.machine(),
        count=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        caches_bytes=caches,
        cpu_flags=tuple(f for f in extensions if flags and f in flags[1].split()),
    )


def split_cores(kind: str = "cpu") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Divide the cores into (the engine's, the clients').

    The engine's compute threads get one hardware thread of every core but the last. The API server,
    the load generator and Prometheus share the remaining ones, so that sending load does not slow
    the engine. With one core both share it. Beside a GPU both may use all cores: the engine
    computes on the GPU, and its load needs more than one core.
    """
    available = sorted(os.sched_getaffinity(0))
    if kind == "gpu":
        return tuple(available), tuple(available)
    first_threads = []
    for cpu in available:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        first = int(re.split(r"[,-]", siblings.read_text())[0]) if siblings.exists() else cpu
        if first == cpu or first not in available:
            first_threads.append(cpu)
    engine = tuple(first_threads[:-1]) or tuple(first_threads)
    clients = tuple(c for c in available if c not in engine) or engine
    return engine, clients


def timing_cores(kind: str) -> tuple[int, ...]:
    """Return the cores to bind a process to that times the engine's work; none beside a GPU."""
    return split_cores()[0] if kind == "cpu" else ()


class CeilingsError(Exception):
    """The ceilings could not be measured; the message is the last line of what measures them."""


def measure_ceilings(machine: Machine) -> Ceilings:
    """Measure in a process of its own (about 10 s), whose end frees torch's memory.

    Raises CeilingsError.
    """
    with (
        tempfile.TemporaryDirectory() as scratch,
        Process(
            "ceilings",
            [*MEASURING, machine.kind],
            log=Path(scratch) / "ceilings.log",
            cores=timing_cores(machine.kind),
            talk=True,
        ) as child,
    ):
        lines = child.stdout.read().splitlines()
        if child.wait() or not lines:
            raise CeilingsError(child.tail(1))
        return Ceilings.model_validate_json(lines[-1])


def environment(root: Path, kind: str) -> Environment:
    """Describe the software on this machine, and the program at `root`, a checkout or none."""

    def git(*args: str) -> str | None:
        if not shutil.which("git") or not (root / ".git").exists():
            return None
        out = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True)
        return out.stdout.strip() if out.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    commit, bundled = git("rev-parse", "HEAD"), root / ".unbundled" / "manifest.json"
    if bundled.exists():  # a bundle's files are those of a commit, without its history
        commit = json.loads(bundled.read_text())["commit"]
    engine_cores, client_cores = split_cores(kind)
    driver, cuda, gpu_clocks, compute_mode = _driver()
    return Environment(
        python=platform.python_version(),
        packages=_packages(),
        kernel=platform.release(),
        driver=driver,
        cuda=cuda,
        compute_mode=compute_mode,
        clocks=gpu_clocks or _cpu_clocks(),
        numa={
            node.name: (node / "cpulist").read_text().strip()
            for node in sorted(Path("/sys/devices/system/node").glob("node[0-9]*"))
        },
        variables=engine_variables(os.environ),
        load_average=round(os.getloadavg()[0], 2),
        git_commit=commit,
        git_dirty=None if status is None else bool(status),
        engine_cores=engine_cores,
        client_cores=client_cores,
    )


def _packages() -> dict[str, str]:
    """List the installed distributions by name, each with its version."""
    # each is read once: its name and its version would read it anew
    read = [distribution.metadata for distribution in metadata.distributions()]
    # of two with one name, Python imports the first on the path
    return {about["Name"].lower(): about["Version"] for about in read[::-1]}


def compiler(kind: str) -> tuple[str, str]:
    """Find the compiler that an engine's start needs; return (what is there, how to mend it).

    On a GPU it compiles the launchers of Triton's kernels, on a CPU the model, unless that runs
    eagerly. The second is empty where nothing is missing.
    """
    gpu = kind == "gpu"
    variable, names = ("CC", ("gcc", "clang")) if gpu else ("CXX", ("g++",))
    for_what = "vLLM's Triton kernels need" if gpu else "vLLM compiles models with"
    path = os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not path:
        return "missing", f"install {names[0]}, or name a compiler in {variable}: {for_what} one"
    if not header.exists():
        package = f"python3.{sys.version_info[1]}-dev"
        return f"{path}, without Python's headers", f"install {package}: {for_what} {header}"
    return path, ""


def cuda_compiler() -> str | None:
    """Find nvcc where FlashInfer 0.6 looks for a CUDA toolkit; None where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = None if home else shutil.which("nvcc")
    in_home = Path(home or "/usr/local/cuda") / "bin" / "nvcc"
    return path or (str(in_home) if in_home.exists() else None)


# Variables of vLLM and its dependencies. SECRET matches names of secrets; values that are addresses
# are left out too, since they may contain a password.
READ_BY_ENGINE = re.compile(
    r"(VLLM|OMP|GOMP|KMP|MKL|ONEDNN|DNNL|CUDA|NVIDIA|NCCL|TORCH|PYTORCH|TRITON|HF|TRANSFORMERS"
    r"|TOKENIZERS|MALLOC|LMFE)_|LD_PRELOAD$"
)
SECRET = re.compile(r"TOKEN$|TOKEN_|KEY|SECRET|PASSW|CREDENTIAL|AUTH")


def engine_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Select the variables that may change an engine, without secrets and the home folder.

    What every command sets by itself is left out.
    """
    return {
        name: recordable(value)
        for name, value in sorted(variables.items())
        if READ_BY_ENGINE.match(name)
        and not SECRET.search(name)
        and "://" not in value
        and (name, value) != (gpus.ORDER, gpus.BY_BUS)
    }


def _cpu_clocks() -> dict[str, str]:
    """Read the first core's clock limits; empty in a virtual machine, which reports none."""
    home = Path("/sys/devices/system/cpu/cpu0/cpufreq")
    names = ("scaling_governor", "scaling_min_freq", "scaling_max_freq")
    return {n: (home / n).read_text().strip() for n in names if (home / n).exists()}


def _driver() -> tuple[str | None, str | None, dict[str, str], str | None]:
    """Read NVIDIA's driver, its CUDA version, the first GPU's highest clocks and compute mode."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None, None, {}, None
    driver, cuda, mode = None, None, None
    clocks = dict[str, str]()
    with contextlib.suppress(pynvml.NVMLError):  # what it does not tell is not recorded
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        version = int(pynvml.nvmlSystemGetCudaDriverVersion())
        cuda = f"{version // 1000}.{version % 1000 // 10}"
        for handle in gpus.visible(pynvml)[:1]:
            mode = gpus.compute_mode(pynvml, handle)
            for name, kind in (("sm", pynvml.NVML_CLOCK_SM), ("memory", pynvml.NVML_CLOCK_MEM)):
                with contextlib.suppress(pynvml.NVMLError):
                    clocks[f"{name}_max"] = f"{pynvml.nvmlDeviceGetMaxClockInfo(handle, kind)} MHz"
    return driver, cuda, clocks, mode


def _measure(kind: str) -> Ceilings:
    import torch

    device = "cuda" if kind == "gpu" else "cpu"
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)

    def best_s(work: Callable[[], object], repeats: int) -> float:
        times = []
        if device == "cuda":
            repeats *= 20  # a GPU leaves its idle clock only after some work
        for _ in range(repeats + 1):  # the first one pages memory in and picks the kernel
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    # 1 GiB each way leaves any cache one guest can count on; more would only lengthen the set-up.
    n_bytes = GIB if device == "cpu" else min(4 * GIB, torch.cuda.mem_get_info()[0] // 4)

    def copy_bytes_per_s() -> float:
        source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return 2 * n_bytes / best_s(lambda: target.copy_(source), 6)

    of_16_bits = gpus.type_of_16_bits(torch, device)

    def matmul_flops_per_s(n: int, dtype: torch.dtype = of_16_bits) -> float:
        a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
        return float(2 * n**3 / best_s(lambda: a @ b, 5))

    def fp8_flops_per_s(n: int) -> float:
        a, b = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device=device)

        def product() -> object:  # the second factor has to lie column by column
            return torch._scaled_mm(
                a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
            )

        return float(2 * n**3 / best_s(product, 5))

    def host_bytes_per_s() -> float:
        source = torch.ones(GIB // 4, dtype=torch.uint8, pin_memory=True)
        target = torch.empty(GIB // 4, dtype=torch.uint8, device=device)
        return float(GIB // 4 / best_s(lambda: target.copy_(source, non_blocking=True), 2))

    sizes: tuple[int, ...] = (1024, 2048) if device == "cpu" else (4096, 8192)
    fp8 = fp32 = None
    if device == "cpu" and cpu().lacks_bf16:
        fp32 = max(matmul_flops_per_s(n, torch.float32) for n in sizes)
        sizes = (256,)  # in software a product of 2048 x 2048 takes ten seconds and more
    if device == "cuda" and torch.cuda.get_device_capability() >= gpus.FP8_CAPABILITY:
        with contextlib.suppress(RuntimeError):  # this build of torch has no kernel for it
            fp8 = max(map(fp8_flops_per_s, sizes))
    link = None
    if device == "cuda":
        with contextlib.suppress(RuntimeError):  # this process may not pin memory
            link = host_bytes_per_s()
    return Ceilings(
        memory_bandwidth_bytes_per_s=copy_bytes_per_s(),
        bf16_flops_per_s=max(map(matmul_flops_per_s, sizes)),
        fp8_flops_per_s=fp8,
        fp32_flops_per_s=fp32,
        host_bytes_per_s=link,
        threads=threads,
        torch=torch.__version__,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1]).model_dump()))
