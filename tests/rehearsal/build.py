"""Build the model of every engine, without memory: run in the environment, as on one GPU.

    python -m tests.rehearsal.build CHECKS.jsonl MODELS

Its layers are made on PyTorch's meta device, where a tensor has a shape and a type and no content.
As it makes them, vLLM chooses what each linear layer and the experts compute with on this GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    destroy_model_parallel,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.lora.model_manager import create_lora_manager
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from serving.hardware import machine as machines
from tests.rehearsal import configure
from tests.rehearsal.checks import Check, last_line, write
from tests.rehearsal.quantizations import kind_of, unexpected
from tests.rehearsal.starts import Start, starts

META = torch.device("meta")


@dataclass(frozen=True)
class Distinct:
    """A model that differs from the others in what it is built from, and an engine that has it."""

    config: Mapping[str, Any]  # its config.json
    adapters: bool
    start: Start

    @property
    def row(self) -> str:
        kind = f"{self.config['architectures'][0]}, {kind_of(self.config)}"
        return f"{kind}, adapters" if self.adapters else kind


def distinct(found: Iterator[Start]) -> Iterator[Distinct]:
    """Leave out each engine whose model is built as one before it."""
    seen = set()
    for start in found:
        text = (Path(start.argv[start.argv.index("--model") + 1]) / "config.json").read_text()
        adapters = "--enable-lora" in start.argv
        key = json.dumps(json.loads(text), sort_keys=True), adapters
        if key not in seen:
            seen.add(key)
            yield Distinct(json.loads(text), adapters, start)


def build(model: Distinct) -> dict[str, int]:
    """Build a model; return what its layers compute with -> how many layers that is.

    Raises whatever vLLM raises.
    """
    with configure.environment(model.start.variables):
        config = configure.engine_config(model.start.argv)
        with contextlib.ExitStack() as stack:
            stack.enter_context(set_current_vllm_config(config))
            ensure_model_parallel_initialized(1, 1)
            stack.callback(destroy_model_parallel)
            stack.enter_context(set_default_torch_dtype(config.model_config.dtype))
            stack.enter_context(META)
            made = initialize_model(config)
            if model.adapters:
                _adapt(made, config)
    return layers(made)


def _adapt(model: Any, config: Any) -> None:
    """Put the layers for adapters around the model's own, as a worker does. Raises ValueError."""
    manager = create_lora_manager(
        model, config.scheduler_config.max_num_seqs, config.scheduler_config.max_num_batched_tokens,
        config.model_config.get_vocab_size(), config.lora_config, config, META,
    )  # fmt: skip
    if not manager.modules:
        raise ValueError("no layer takes adapters")


def layers(model: Any) -> dict[str, int]:
    """Count a model's linear layers and groups of experts by what computes them."""
    counts: dict[str, int] = {}
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        experts = hasattr(method, "experts_cls")
        if method is not None and (isinstance(module, LinearBase) or experts):
            counts[computes(module, method)] = counts.get(computes(module, method), 0) + 1
    return counts


def computes(layer: Any, method: Any) -> str:
    """Name what computes a layer: vLLM's scheme or method, and the kernel where it has chosen one.

    The attributes are those of vLLM 0.26.
    """
    scheme = getattr(layer, "scheme", None)
    chooses = scheme or method
    name = type(chooses).__name__
    if backend := getattr(method, "unquantized_backend", None):  # of experts
        return f"{name} with {backend.value}"
    kernels = (getattr(chooses, a, None) for a in ("kernel", "fp8_linear", "linear_kernel"))
    kernel = next((type(k).__name__ for k in kernels if k is not None), "")
    return f"{name} with {kernel}" if kernel else name


def checks(home: Path) -> Iterator[Check]:
    """Build each distinct model of the labs' engines."""
    found = starts(machines.detect(), home, configure.LIMITS_QUEUES)
    resolved = (start for start in found if isinstance(start, Start))
    with tempfile.NamedTemporaryFile() as meeting_point:
        init_distributed_environment(1, 0, f"file://{meeting_point.name}", 0, "gloo")
        for model in distinct(resolved):
            name = f"{model.start.lab}: {model.start.variant}"
            try:
                counts = build(model)
            except Exception as error:  # whatever vLLM raises is what the check is for
                told = f"{type(error).__name__}: {last_line(str(error))}"
                yield Check(what=model.row, name=name, error=told)
                continue
            others = unexpected(kind_of(model.config), counts)
            yield Check(what=model.row, name=name, error=others, built=", ".join(counts))


if __name__ == "__main__":
    write(Path(sys.argv[1]), checks(Path(sys.argv[2])))
    os._exit(0)  # vLLM's threads would wait
