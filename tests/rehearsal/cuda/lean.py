"""Import and build with what a lean bundle has alone: run in the environment, as on one GPU.

    python -m tests.rehearsal.cuda.lean CHECKS.jsonl MODELS

What the bundle leaves out (`serving/lean.py`) is hidden from this process: packages with all that
only they need, and files of packages that it carries. No import finds them, as if they had never
been installed.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from packaging.requirements import Requirement

from serving.bundle import normal
from serving.lean import LEAN, Lean
from serving.weights.models import ROOT
from tests.rehearsal.cuda.checks import Check, last_line, write

WHAT = "with the lean packages hidden"
MODULES = (
    # the server, the engine's process, the model's two runners
    "vllm.entrypoints.openai.api_server", "vllm.v1.engine.async_llm", "vllm.v1.engine.core",
    "vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.gpu.model_runner",
    # models, how they attend, and what fills them
    "vllm.model_executor.models.llama", "vllm.model_executor.models.qwen3",
    "vllm.model_executor.models.qwen3_moe", "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.attention.backends.triton_attn", "vllm.vllm_flash_attn",
    "vllm.model_executor.model_loader.dummy_loader", "serving.inside.vllm_worker",
    "serving.inside.guard",
    # quantized weights, adapters, drafts, offloading
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.lora.worker_manager", "vllm.lora.punica_wrapper.punica_gpu",
    "vllm.v1.spec_decode.draft_model",
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector",
    # structured outputs
    "vllm.v1.structured_output.backend_guidance", "vllm.v1.structured_output.backend_outlines",
    "vllm.v1.structured_output.backend_xgrammar",
    "vllm.v1.structured_output.backend_lm_format_enforcer",
)  # fmt: skip
AS_ASKED = ("lmformatenforcer.integrations.vllm",)  # once vLLM has called the lab's plugin


# ----------------------------------------------------------------------------------- what is hidden


def roots() -> list[Requirement]:
    """Read what the lab itself needs on a GPU."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = (*project["dependencies"], *project["optional-dependencies"]["cuda"])
    return [Requirement(line) for line in needs]


def needed(requirements: Iterable[Requirement], without: Sequence[str] = ()) -> set[str]:
    """Return the names of installed packages that these need, and those need, but for some."""
    waiting, found = list(requirements), set[tuple[str, str]]()
    while waiting:
        requirement = waiting.pop()
        name = normal(requirement.name)
        new = {(name, extra) for extra in ("", *requirement.extras)} - found
        if name in without or not new:
            continue
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found |= new
        for need in map(Requirement, lines):
            if any(not need.marker or need.marker.evaluate({"extra": e}) for _, e in new):
                waiting.append(need)
    return {name for name, _ in found}


def left_out(lean: Lean, requirements: Sequence[Requirement]) -> set[str]:
    """Return the packages that a lean bundle leaves out, with all that only they need."""
    return {*lean.packages} | needed(requirements) - needed(requirements, lean.packages)


def hidden_files(lean: Lean, packages: Iterable[str]) -> set[str]:
    """Return the files of these packages, and those that stay behind of the others."""
    hidden = set()
    for distribution in metadata.distributions():
        name = normal(distribution.metadata["Name"])
        stays = re.compile("" if name in packages else lean.files.get(name, "(?!)"))
        files = distribution.files or []
        hidden |= {str(distribution.locate_file(file)) for file in files if stays.match(str(file))}
    return hidden


class Without(PathFinder):
    """Finds what Python finds on its path, but for hidden packages and files."""

    packages: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        spec: ModuleSpec | None = super().find_spec(fullname, path, target)
        return None if spec and spec.origin in cls.files else spec

    @classmethod
    def find_distributions(cls, *args, **kwargs):  # type: ignore[no-untyped-def]
        for distribution in super().find_distributions(*args, **kwargs):
            if normal(distribution.metadata["Name"]) not in cls.packages:
                yield distribution


def hide(packages: Iterable[str], files: Iterable[str]) -> None:
    """Hide packages and files from every later import of this process."""
    Without.packages, Without.files = frozenset(packages), frozenset(files)
    sys.meta_path[sys.meta_path.index(PathFinder)] = Without
    importlib.invalidate_caches()


# --------------------------------------------------------------------------------------- the checks


def imports(modules: Iterable[str]) -> Iterator[Check]:
    for name in modules:
        try:
            importlib.import_module(name)
            error = ""
        except Exception as reason:  # whatever is raised is what the check is for
            error = f"{type(reason).__name__}: {last_line(str(reason))}"
        yield Check(what=f"imports {WHAT}", name=name, error=error)


def checks(home: Path) -> Iterator[Check]:
    """Import what an engine of the labs imports, then make and build what a lean bundle serves."""
    from serving.inside.lm_format_enforcer import offer_moved_classes

    lean = LEAN["hopper"]
    packages = left_out(lean, roots())
    files = hidden_files(lean, packages)
    early = sorted(n for n, m in sys.modules.items() if getattr(m, "__file__", None) in files)
    error = f"imported before it could be hidden: {', '.join(early)}" if early else ""
    yield Check(what=f"imports {WHAT}", name="nothing that is hidden", error=error)
    hide(packages, files)
    yield from imports(MODULES)
    offer_moved_classes()
    yield from imports(AS_ASKED)

    from tests.rehearsal.cuda import build, configure

    for check in configure.checks(home, ("random",), (True,)):
        yield check.model_copy(update={"what": f"engines {WHAT}"})
    for check in build.checks(home, ("random",)):
        yield check.model_copy(update={"what": f"models {WHAT}"})


if __name__ == "__main__":
    write(Path(sys.argv[1]), checks(Path(sys.argv[2])))
    os._exit(0)  # vLLM's threads would wait
