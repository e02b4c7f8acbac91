"""Hook into vLLM's worker before it loads random weights (`serving/random_weights.py`).

It is named by `--worker-extension-cls`, and only a worker may import it.
"""

from __future__ import annotations

from serving.random_weights import filled


class RandomWeights:
    """Extends the worker by nothing: that this module is imported is what counts."""


def _extend_the_loader() -> None:
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    DummyModelLoader.load_weights = filled(DummyModelLoader.load_weights)


_extend_the_loader()
