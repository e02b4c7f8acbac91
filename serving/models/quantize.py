"""Weights in fewer bits.

What is made is a model folder that vLLM serves like its base: the linear layers quantized,
`lm_head` and the embeddings in BF16, the tokenizer the same. The methods differ in how they round.

Round to nearest ("rtn") uses the weights only. The others also use the activations that meet the
weights, on a calibration text: GPTQ (Frantar et al. 2022) rounds a row weight by weight and moves
each error into the weights not yet rounded, by the inverse Hessian of the layer's output; AWQ (Lin
et al. 2023) scales up the channels that meet large activations, so that rounding hurts them less;
SmoothQuant (Xiao et al. 2022) moves the outliers of the activations into the weights, since in
W8A8 the activations are rounded too. 4-bit weights share a scale among 128 neighbours, or 64 where
128 does not divide the model's widths.

Every tool pins its own transformers, so each has an environment of its own, .tools/quantize-TOOL,
made on first use from serving/locks/quantize-TOOL.txt, where a script of
serving/models/quantizers runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from serving.hardware.machine import cpu
from serving.models import catalog, making
from serving.models.making import MakerError
from serving.packaging import install
from serving.places import IN_CLONE
from serving.platforms import PLATFORMS
from serving.processes.process import Process

ROOT = install.ROOT
SAMPLE_TOKENS = 256
GPTQ_SAMPLES = 64
AWQ_SAMPLES = 16  # the paper's number: it only needs the channels' average sizes
ENVIRONMENT_GB = 4  # what the largest takes, and what pip unpacks on the way
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges*")
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Tool:
    """A quantization tool; its lock and script have its name."""

    name: str
    package: str  # on PyPI
    layer: str  # a regular expression for its log: (layers begun)/(all layers)
    transformers: int = 5

    @property
    def lock(self) -> Path:
        return ROOT / "serving" / "locks" / f"quantize-{self.name}.txt"

    @property
    def torch_lock(self) -> Path:
        """The lock of torch's CPU build, which is the one of the platform."""
        return install.lock_of(ROOT, "cpu-torch")

    @property
    def home(self) -> Path:
        return ROOT / ".tools" / f"quantize-{self.name}"

    @property
    def script(self) -> Path:
        return ROOT / "serving" / "models" / "quantizers" / f"{self.name.replace('-', '_')}.py"

    def pinned(self, package: str) -> str:
        """Return the version of a package in the tool's lock."""
        pin = install.pin(install.entries(self.lock)[package.replace("_", "-")])
        return pin.split("==")[1].split()[0]


@dataclass(frozen=True)
class Method:
    """A way to quantize: the tool, and what it makes."""

    tool: Tool
    bits: int  # of a weight
    what: str
    samples: int  # of the calibration text, 0 where the weights alone decide


LLM_COMPRESSOR = Tool("llm-compressor", "llmcompressor", r"\((\d+)/(\d+)\): Calibrating")
GPTQMODEL = Tool("gptqmodel", "gptqmodel", r"layer (\d+) of (\d+)")
AUTO_GPTQ = Tool("auto-gptq", "auto_gptq", r"Start quantizing layer (\d+)/(\d+)", transformers=4)
AUTOAWQ = Tool("autoawq", "autoawq", r"AWQ:.* (\d+)/(\d+) \[", transformers=4)
METHODS: dict[str, Method] = {
    "w8a8-rtn": Method(LLM_COMPRESSOR, 8, "INT8 weights and activations, rounded to nearest", 0),
    "w8a8": Method(
        LLM_COMPRESSOR, 8, "INT8 weights and activations by SmoothQuant, then GPTQ", GPTQ_SAMPLES
    ),
    "w4a16-rtn": Method(LLM_COMPRESSOR, 4, "INT4 weights, rounded to nearest", 0),
    "w4a16-gptq": Method(LLM_COMPRESSOR, 4, "INT4 weights by GPTQ", GPTQ_SAMPLES),
    "w4a16-awq": Method(LLM_COMPRESSOR, 4, "INT4 weights with zero points by AWQ", AWQ_SAMPLES),
    "fp8": Method(LLM_COMPRESSOR, 8, "FP8 (E4M3) weights and activations, rounded to nearest", 0),
    "gptqmodel": Method(GPTQMODEL, 4, "INT4 weights by GPTQ, with GPTQModel", GPTQ_SAMPLES),
    "auto-gptq": Method(
        AUTO_GPTQ, 4, "INT4 weights by GPTQ, with AutoGPTQ (archived)", GPTQ_SAMPLES
    ),
    "autoawq": Method(
        AUTOAWQ, 4, "INT4 weights with zero points by AWQ, with AutoAWQ (archived)", AWQ_SAMPLES
    ),
}


# --- the tool's environment ---------------------------------------------------------------------


def digest(tool: Tool) -> str:
    """Hash what an environment is made from: the locks, its folder, this Python."""
    locks = (tool.lock.read_text(), tool.torch_lock.read_text())
    sources = (*locks, str(tool.home), os.path.realpath(sys.executable))
    return hashlib.sha256(repr(sources).encode()).hexdigest()


def is_set_up(tool: Tool) -> bool:
    """Tell whether the tool's environment exists and is up to date."""
    ready = tool.home / "ready"
    exists = ready.exists() and install.venv_python(tool.home).exists()
    return exists and ready.read_text() == digest(tool)


def is_available(tool: Tool) -> bool:
    """Tell whether the tool is set up, or pip can set it up."""
    return is_set_up(tool) or _index_answers()


@cache
def _index_answers() -> bool:
    """Tell whether pip reaches its package index: it is asked for setuptools."""
    argv = [sys.executable, "-m", "pip", "--retries=0", "--timeout=5", "index", "versions"]
    return subprocess.run([*argv, "setuptools"], capture_output=True).returncode == 0


def environment(tool: Tool) -> Path:
    """Return the Python of the tool's environment; set that up where it is not up to date.

    Raises MakerError.
    """
    if not IN_CLONE:
        raise MakerError(f"{tool.name} is set up in a clone of the repository alone: run it there")
    with install.alone(ROOT):
        python, ready = install.venv_python(tool.home), tool.home / "ready"
        if is_set_up(tool):
            return python
        if (free := shutil.disk_usage(ROOT).free / 1e9) < ENVIRONMENT_GB:
            raise MakerError(
                f"{tool.name} needs about {ENVIRONMENT_GB} GB for its environment and {ROOT} has"
                f" {free:.1f} GB free: free some, and run this again"
            )
        print(f"setting up {tool.name} (once, about a minute)", flush=True)
        shutil.rmtree(tool.home, ignore_errors=True)
        tool.home.mkdir(parents=True)
        try:
            with install.Step(f"set up {tool.name}") as step:
                _fill(tool, step)
            ready.write_text(digest(tool))
        except install.SetupError as error:
            raise MakerError(
                f"{tool.name} could not be set up and nothing of it was kept; check that pip"
                f" reaches its package index (PIP_INDEX_URL) and run this again: {error}"
            ) from error
        finally:
            if not ready.exists():
                shutil.rmtree(tool.home, ignore_errors=True)
        return python


def _fill(tool: Tool, step: install.Step) -> None:
    platform = install.detect_platform()
    install.make_venv(tool.home, platform, step)
    # Without dependencies: the lock has them all, at versions that work, which are not always those
    # that a tool requires. Few of all the modules are ever imported: compiling them all beforehand
    # would take longer than a method does.
    listed = install.entries(tool.lock)
    torch = install.pin(listed.pop("torch"))
    first = {name: listed[name] for name in install.TORCH_NEEDS}  # and what packages are built with
    install.install_files(tool.home, step, tool.lock, first, "--no-compile")
    if PLATFORMS[platform].torch_index:
        install.install_torch(tool.home, platform, tool.torch_lock, step, names=("torch",))
    elif not install.uv(tool.home, step, "--no-compile", torch):  # with CUDA's packages
        raise install.failure(tool.home, "uv could not install torch")
    exactly = ("--no-compile", "--no-build-isolation")
    install.install_files(tool.home, step, tool.lock, listed, *exactly)


# --- the job ------------------------------------------------------------------------------------


def windows(tokens: Sequence[int], count: int) -> list[list[int]]:
    """Cut calibration samples of SAMPLE_TOKENS, evenly spread over the text.

    They overlap if the text is short. Nothing is random: the same text always gives the same
    samples, from all of its passages.
    """
    last = len(tokens) - SAMPLE_TOKENS
    starts = [i * last // (count - 1) for i in range(count)]
    return [list(tokens[start : start + SAMPLE_TOKENS]) for start in starts]


def read_samples(base: Path, source: Path, count: int) -> list[list[int]]:
    """Read and tokenize the calibration text; return its samples."""
    from tokenizers import Tokenizer

    passages = making.read_passages(source)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    return windows(tokenizer.encode("\n\n".join(passages), add_special_tokens=False).ids, count)


def with_older_config(base: Path, config: dict[str, Any], folder: Path) -> Path:
    """Write a model folder with the keys that transformers 4 reads; the weights are links.

    Where the file system has no links they are copied.
    """
    older = {k: v for k, v in config.items() if k not in ("rope_parameters", "dtype")}
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        older["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = rope
    if "dtype" in config:
        older["torch_dtype"] = config["dtype"]
    folder.mkdir()
    for path in (*catalog.shards(base), *base.glob(catalog.INDEX)):
        try:
            (folder / path.name).symlink_to(path.resolve())
        except OSError:
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(older))
    return folder


def group_size(config: dict[str, Any]) -> int:
    """Choose how many 4-bit weights share a scale: 128 if that divides the widths, else 64."""
    widths = (config["hidden_size"], config["intermediate_size"])
    return 128 if all(width % 128 == 0 for width in widths) else 64


def run_tool(tool: Tool, python: Path, job: Path, log: Path) -> None:
    """Run the tool's script, and print which layer its log shows. Raises MakerError.

    Some methods pass over the layers more than once.
    """
    # -I keeps this project's packages out of the tool's environment
    argv = [str(python), "-I", str(tool.script), str(job)]
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    log.unlink(missing_ok=True)
    shown = None
    with Process(tool.name, argv, log=log, env={"PATH": path, "HF_HUB_OFFLINE": "1"}) as process:
        while process.returncode is None:
            time.sleep(0.2)
            logged = re.findall(tool.layer, process.tail(50))
            if logged and logged[-1] != shown:
                shown = logged[-1]
                print("layer {}/{}".format(*shown), flush=True)
        if process.returncode:
            raise MakerError(
                f"{tool.name} ended with code {process.returncode}: {process.tail(1)}"
                f" (all of it: {log})"
            )


def make(base: Path, out: Path, method: str, source: Path) -> dict[str, Any]:
    """Quantize a model by one of METHODS. Raises MakerError."""
    recipe, config = METHODS[method], making.read_config(base)
    making.require_16_bits(base, config)
    samples = read_samples(base, source, recipe.samples) if recipe.samples else []
    needed = sum(path.stat().st_size for path in catalog.shards(base))
    if (free := shutil.disk_usage(out).free) < needed:
        raise MakerError(
            f"{out.parent} has {free / 1e9:.1f} GB free and the result may take"
            f" {needed / 1e9:.1f} GB: free some"
        )
    python = environment(recipe.tool)
    began = time.monotonic()
    work = out / "work"  # some tools write beside their result
    work.mkdir()
    result, job = work / "made", work / "job.json"
    size = group_size(config)
    older = recipe.tool.transformers < 5
    source_model = with_older_config(base, config, work / "base") if older else base
    task = {
        "method": method,
        "samples": samples,
        "group_size": size,
        "in_float32": cpu().lacks_bf16,  # and written in BF16, as elsewhere
        "base": str(source_model.resolve()),
        "out": str(result.resolve()),
    }
    job.write_text(json.dumps(task))
    print(f"quantizing with {recipe.tool.name}", flush=True)
    run_tool(recipe.tool, python, job, recipe.tool.home / f"{method}.log")
    for path in result.iterdir():
        shutil.move(path, out)
    shutil.rmtree(work)
    for pattern in (*TOKENIZER_FILES, GENERATION):
        for path in base.glob(pattern):
            shutil.copy(path, out)
    return {
        "method": method,
        "tool": recipe.tool.name,
        "tool_version": recipe.tool.pinned(recipe.tool.package),
        "calibration": source.name if recipe.samples else None,
        "samples": [recipe.samples, SAMPLE_TOKENS] if recipe.samples else None,
        "bits": recipe.bits,
        "group_size": size if recipe.bits == 4 else None,
        "seconds": round(time.monotonic() - began, 1),
        "bytes": sum(path.stat().st_size for path in out.glob("*.safetensors")),
    }
