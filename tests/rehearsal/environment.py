"""The environment of the rehearsal: the lock for CUDA as a GPU machine installs it.

What only compiles kernels, draws pictures and sound, or checks the code is left out: nothing is
computed here.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from serving.packaging import install
from serving.packaging.install import ROOT, SetupError, Step

HOME = ROOT / ".tools" / "rehearsal-cuda"
PYTHON = install.venv_python(HOME)
LOCK = install.lock_of(ROOT, "cuda")
ABOUT = "4 GB to download, 7 GB of disk and some ten minutes"
NEEDED_GB = 9  # of disk, with what is unpacked on the way
LEFT_OUT = (  # packages of the lock whose names begin so
    *("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cutlass-dsl", "tilelang"),
    *("torchaudio", "torchcodec"),
    *("deno", "mypy", "promql-parser", "pytest", "ruff", "types-", "xllamacpp"),
)


def make() -> None:
    """Make what is missing of the environment and of libcuda's stub. Raises SetupError."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise SetupError("no C compiler (cc or gcc) is on PATH: libcuda's stub needs one")
    made_from = (LOCK.read_text(), LEFT_OUT, sys.version, str(HOME))
    digest = hashlib.sha256(repr(made_from).encode()).hexdigest()
    ready = HOME / ".venv" / "ready"
    if not ready.exists() or ready.read_text() != digest:
        if shutil.disk_usage(ROOT).free < NEEDED_GB * 1e9:
            raise SetupError(f"{ROOT} has less than {NEEDED_GB} GB of free disk")
        print(f"vLLM for CUDA goes to {HOME.relative_to(ROOT)}: {ABOUT}", flush=True)
        with Step("virtual environment") as step:
            install.make_venv(HOME, "cuda", step)
        with Step("packages for cuda") as step:
            install.install_locked(HOME, step, LOCK, LEFT_OUT)
        ready.write_text(digest)
    source = Path(__file__).with_name("libcuda.c")
    stub = str(HOME / "libcuda.so.1")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", stub, str(source)], check=True)
