"""Hook into vLLM's worker before it loads random weights (`serving/plugins/random_weights.py`).

It also registers the routing by which tokens are sent to experts evenly.

It is named by `--worker-extension-cls`, and only a worker may import it.
"""

from __future__ import annotations

import os

from serving.metrics import EVEN_ROUTING
from serving.plugins.random_weights import ROUTING, filled, register_even_routing


class RandomWeights:
    """Extends the worker by nothing: that this module is imported is what counts."""


def _extend_the_loader() -> None:
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    DummyModelLoader.load_weights = filled(DummyModelLoader.load_weights)


_extend_the_loader()
if os.environ.get(ROUTING) == EVEN_ROUTING:
    register_even_routing()
