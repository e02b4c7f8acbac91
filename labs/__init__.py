"""Provide the labs, in the order of the course."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from labs.harness.spec.lab import Lab

LABS: dict[str, Lab]
"""Holds every lab in the order of the course: whatever enumerates labs reads this."""


FIRST = (
    "single-stream", "continuous-batching", "weight-quantization", "kv-quantization",
    "prefix-caching", "chunked-prefill", "speculative-decoding", "multi-lora",
)  # fmt: skip
"""These labs run first where the time is limited; labs that are not named here follow."""


def _labs() -> dict[str, Lab]:
    return {
        lab.name: lab
        for lab in (
            _lab("single_stream"),
            _lab("continuous_batching"),
            _lab("chunked_prefill"),
            _lab("overload"),
            _lab("scale_out"),
            _lab("diagnosis"),
            _lab("tiled_attention"),
            _lab("paged_kv"),
            _lab("prefix_caching"),
            _lab("prefix_routing"),
            _lab("agent_sessions"),
            _lab("kv_quantization"),
            _lab("speculative_decoding"),
            _lab("weight_quantization"),
            _lab("context_retrieval"),
            _lab("weight_pruning"),
            _lab("mixture_of_experts"),
            _lab("multi_lora"),
            _lab("structured_output"),
            _lab("many_samples"),
            _lab("determinism"),
            _lab("serving_engines"),
            _lab("quantization_tools"),
        )
    }


def _lab(module: str) -> Lab:
    """Import the `LAB` that `labs/<module>/lab.py` defines."""
    from labs.harness.spec.lab import Lab

    lab = importlib.import_module(f"labs.{module}.lab").LAB
    if not isinstance(lab, Lab):
        raise TypeError(f"labs.{module}.lab.LAB is no Lab")
    return lab


def __getattr__(name: str) -> dict[str, Lab]:
    """Import the labs when they are first asked for: importing the package takes no time."""
    if name != "LABS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = labs = _labs()
    return labs
