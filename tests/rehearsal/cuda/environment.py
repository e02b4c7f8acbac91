"""Make the environment of the rehearsal: `python3.12 -m tests.rehearsal.cuda.environment`.

It is the lock file for CUDA as a GPU machine installs it, without what only compiles kernels, draws
pictures and sound, or checks the code: nothing is computed here. Standard library only, as it runs
with the Python that it makes the environment for.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from serving import install
from serving.install import ROOT, SetupError, Step

HOME = ROOT / ".tools" / "rehearsal-cuda"
PYTHON = install.venv_python(HOME)
LOCK = install.lock_of(ROOT, "cuda")
STUB = HOME / "libcuda.so.1"
SOURCE = Path(__file__).with_name("libcuda.c")
ABOUT = "4 GB to download, 7 GB of disk and some ten minutes"
NEEDED_GB = 9  # of disk, with what pip unpacks on the way
LEFT_OUT = (  # packages of the lock whose names begin so
    *("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cutlass-dsl", "tilelang"),
    *("torchaudio", "torchcodec"),
    *("deno", "mypy", "promql-parser", "pytest", "ruff", "types-", "xllamacpp"),
)


def versions(lock: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Read the oldest and the newest Python that a lock is for, from its head."""
    oldest, newest = re.findall(r"(\d+)\.(\d+)", re.findall(r"Python ([\d.]+ to [\d.]+)", lock)[0])
    return (int(oldest[0]), int(oldest[1])), (int(newest[0]), int(newest[1]))


def require_python() -> None:
    """Check that the lock is for this Python. Raises SetupError."""
    oldest, newest = versions(LOCK.read_text())
    if not oldest <= sys.version_info[:2] <= newest:
        raise SetupError(
            f"{sys.executable} is Python {sys.version_info[0]}.{sys.version_info[1]}, and"
            f" {LOCK.name} is for {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}: name another"
            " with PYTHON="
        )


def compiler() -> str:
    """Find the C compiler. Raises SetupError."""
    found = shutil.which("cc") or shutil.which("gcc")
    if not found:
        raise SetupError("no C compiler (cc or gcc) is on PATH: libcuda's stub needs one")
    return found


def digest() -> str:
    """Hash what the environment is made from, with the Python that it is made with."""
    made_from = (LOCK.read_text(), LEFT_OUT, sys.version, str(HOME))
    return hashlib.sha256(repr(made_from).encode()).hexdigest()


def make() -> None:
    """Make what is missing of the environment and the stub. Raises SetupError."""
    require_python()
    cc = compiler()
    ready = HOME / ".venv" / "ready"
    if not ready.exists() or ready.read_text() != digest():
        if shutil.disk_usage(ROOT).free < NEEDED_GB * 1e9:
            raise SetupError(f"{ROOT} has less than {NEEDED_GB} GB of free disk")
        print(f"vLLM for CUDA goes to {HOME.relative_to(ROOT)}: {ABOUT}", flush=True)
        os.environ["PIP_NO_CACHE_DIR"] = "1"  # it would keep as much again
        with Step("virtual environment") as step:
            install.make_venv(HOME, "cuda", step)
        with Step("packages for cuda") as step:
            install.install_locked(HOME, step, LOCK, LEFT_OUT)
        ready.write_text(digest())
    subprocess.run([cc, "-shared", "-fPIC", "-o", str(STUB), str(SOURCE)], check=True)


def main() -> int:
    try:
        make()
    except (SetupError, OSError, subprocess.CalledProcessError) as error:
        print(f"the environment was not made: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
