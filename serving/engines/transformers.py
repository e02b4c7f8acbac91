"""Hugging Face transformers: its own server, `transformers serve`, and what it asks of a request.

It answers one request after another with `generate`, or, with `continuous-batching`, all at once
from a paged cache. It has no page of metrics, refuses `ignore_eos` and passes over
`stream_options`: what it did is proved by what the client read alone. Usage comes with the last
event, and every other event is a token's text.
Source: `transformers serve --help` and its module `transformers.cli.serving`; observed on 5.19.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from serving.engines.base import Engine, EngineError
from serving.engines.flags import Flags, Harmless, TypedFlags
from serving.hardware import machine as machines
from serving.models.catalog import Model, Shape
from serving.processes.ports import LOOPBACK

SERVING = ("fastapi", "uvicorn", "openai")  # the extra `serving` brings these
PROCESS_BYTES = 2 * 2**30  # on the host, beside its weights and KV cache
NO_TOKEN = -1  # stands in the place of the token that ends an answer: no token has this number


class TransformersHarmless(Harmless, frozen=True):
    """Lists what sets a size or a way of computing."""

    continuous_batching: bool = False
    compile: bool = False
    cb_block_size: int = 0
    cb_num_blocks: int = 0
    cb_max_batch_tokens: int = 0
    cb_max_memory_percent: float = 0
    cb_use_cuda_graph: bool = False
    default_seed: int = 0
    dtype: Literal["float32"] = "float32"


class Transformers(Engine):
    """A server of Hugging Face's transformers."""

    title = "transformers serve"
    command: ClassVar[Sequence[str]] = (sys.executable, "-m", "serving.plugins.transformers_server")
    distributions = ("transformers",)
    start_s = 10.0
    in_float32: ClassVar[Flags] = {"dtype": "float32"}
    harmless = TransformersHarmless
    other_flags = (
        "attn-implementation",
        "chat-template-kwargs",
        "device",
        "dtype",
        "log-level",
        "model-timeout",
        "quantization",
        "reasoning",
        "trust-remote-code",
    )
    set_by_lab = ("host", "port", "model")
    lacks = (
        "no page of metrics: its queue, cache and batch are not seen",
        "one request at a time without `continuous-batching`",
        "refuses `ignore_eos`: the lab names a token that ends an answer and that no model writes",
        "counts its tokens in the last event alone",
        "no key: the lab puts its own guard before it",
        "no prefix cache, no speculation",
    )

    def __init__(self, name: str, model: Model, flags: Flags, **settings: Any) -> None:
        super().__init__(name, model, flags, **settings)
        self._folder = str(model.path)

    @property
    def request_fields(self) -> Mapping[str, object]:
        """It serves the one model that it was started with, by the name of its folder."""
        forever = json.dumps({"eos_token_id": NO_TOKEN, "do_sample": False})
        return {"model": self._folder, "ignore_eos": None, "generation_config": forever}

    @property
    def model_names(self) -> Mapping[str, str]:
        return {answered: self.model for answered in (f"{self._folder}@main", self._folder)}

    @classmethod
    def cannot_serve(
        cls, model: Model, flags: Flags, machine: machines.Machine, weight_bits: int = 16
    ) -> str:
        try:
            cls.version()
        except EngineError as error:
            return str(error)
        if missing := [name for name in SERVING if importlib.util.find_spec(name) is None]:
            return (
                f"{cls.title} lacks {', '.join(missing)}: run"
                " `.venv/bin/pip install 'transformers[serving]'`"
            )
        return f"{cls.title} needs the weights, and these are random" if model.dummy else ""

    @classmethod
    def server_argv(cls, model: Model, flags: Flags, port: int) -> list[str]:
        own = ["--model", str(model.path), "--host", LOOPBACK, "--port", str(port)]
        return [*own, *cls.flag_argv(flags)]

    @classmethod
    def environment(cls, kind: str, model: Model, beside: Sequence[Flags] = ()) -> dict[str, str]:
        env = {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
        if model.path.exists():
            env["HF_HUB_OFFLINE"] = "1"
        if kind == "cpu":  # as many threads as vLLM gets
            env["OMP_NUM_THREADS"] = str(len(machines.split_cores()[0]))
        return env

    @classmethod
    def host_memory_bytes(cls, flags: Flags, shape: Shape) -> int:
        typed = TypedFlags(flags)
        tokens = typed.integer("cb-block-size", 0) * typed.integer("cb-num-blocks", 0)
        token_bytes = shape.kv_bytes_per_token(4 if cls.in_float32.items() <= flags.items() else 2)
        return PROCESS_BYTES + shape.held_bytes + int(tokens * token_bytes)


ENGINE = Transformers
