"""The engines that the lab can start, by the name a variant gives: one module and one line each.

`base.py` says what the lab needs of an engine. `endpoint.py` is a server that somebody else has
started.
"""

from serving.engines.base import Engine
from serving.engines.llama_cpp import LlamaCpp
from serving.engines.transformers import Transformers
from serving.engines.vllm import Vllm

DEFAULT_ENGINE = "vllm"
ENGINES: dict[str, type[Engine]] = {
    "vllm": Vllm,
    "transformers": Transformers,
    "llama-cpp": LlamaCpp,
}
