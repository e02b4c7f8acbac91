"""Time what each backend of structured outputs takes over a structure, before any engine starts.

vLLM's own classes do the work, with the model's tokenizer: a grammar is compiled from a structure
that the backend has not seen, and again from the same one; then a valid answer is walked through,
and for each of its tokens the *mask* is filled: the bit of every entry of the vocabulary that may
come next. Each figure is the least over several structures of one form, because other work can only
add time. A backend that cannot be used here is named with the reason, and has no figures.

It runs in the engine's environment. Its source has lines `{"form": .., "structure": {"json" or
"regex": ..}, "answer": ..}`.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from serving.plugins.lm_format_enforcer import AS_OTHERS, NAME, offer_moved_classes

BACKENDS = {
    "xgrammar": ("backend_xgrammar", "XgrammarBackend"),
    "guidance": ("backend_guidance", "GuidanceBackend"),
    "outlines": ("backend_outlines", "OutlinesBackend"),
    NAME: ("backend_lm_format_enforcer", "LMFormatEnforcerBackend"),
}
"""Name of `--structured-outputs-config` -> module and class of vllm/v1/structured_output."""


def make(base: Path, out: Path, source: Path) -> dict[str, Any]:
    """Time the backends; nothing is written to `out`."""
    logging.disable(logging.WARNING)  # vLLM describes at length an engine that never serves
    asked: dict[str, list[Mapping[str, Any]]] = {}
    for line in source.read_text().splitlines():
        given = json.loads(line)
        asked.setdefault(given["form"], []).append(given)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.tokenizers import cached_tokenizer_from_config

    config = EngineArgs(model=str(base)).create_engine_config()
    tokenizer = cached_tokenizer_from_config(model_config=config.model_config)
    backends = {}
    for name in BACKENDS:
        print(f"timing {name}", flush=True)
        backends[name] = timed(name, config, tokenizer, asked)
    return {
        "backends": backends,
        "processors": os.cpu_count() or 1,
        "vocabulary": config.model_config.get_vocab_size(),
    }


def timed(
    name: str, config: Any, tokenizer: Any, asked: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Time one backend: its start, and each form; or say why it cannot be used here."""
    began = time.monotonic()
    try:
        backend = _backend(name)(
            config, tokenizer=tokenizer, vocab_size=config.model_config.get_vocab_size()
        )
        start_s = time.monotonic() - began
        forms = {form: _timed_form(backend, tokenizer, given) for form, given in asked.items()}
    except Exception as error:  # of any of four libraries
        return {"error": _reason(error), "forms": {}}
    return {"error": None, "start_s": start_s, "forms": forms}


def _backend(name: str) -> Any:
    offer_moved_classes()
    os.environ.update(AS_OTHERS)
    module, class_ = BACKENDS[name]
    return getattr(importlib.import_module(f"vllm.v1.structured_output.{module}"), class_)


def _timed_form(
    backend: Any, tokenizer: Any, asked: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    fresh_s, again_s, mask_s = [], [], []
    for given in asked:
        compile_s, grammar = _compiled(backend, given["structure"])
        fresh_s.append(compile_s)
        again_s.append(_compiled(backend, given["structure"])[0])
        masks_s = list(_masks_s(backend, grammar, tokenizer, given["answer"]))
        mask_s.append(sum(masks_s) / len(masks_s))
    return {"compile_s": min(fresh_s), "again_s": min(again_s), "mask_s": min(mask_s)}


def _compiled(backend: Any, structure: Mapping[str, Any]) -> tuple[float, Any]:
    from vllm.v1.structured_output.backend_types import StructuredOutputOptions

    began = time.monotonic()
    if "regex" in structure:
        grammar = backend.compile_grammar(StructuredOutputOptions.REGEX, structure["regex"])
    else:
        schema = json.dumps(structure["json"])
        grammar = backend.compile_grammar(StructuredOutputOptions.JSON, schema)
    return time.monotonic() - began, grammar


def _masks_s(backend: Any, grammar: Any, tokenizer: Any, answer: str) -> Iterator[float]:
    """Yield the seconds of filling the mask before each token of a valid answer."""
    mask = backend.allocate_token_bitmask(1)
    for token in tokenizer.encode(answer, add_special_tokens=False):
        began = time.monotonic()
        grammar.fill_bitmask(mask, 0)
        yield time.monotonic() - began
        if not grammar.accept_tokens("timed", [token]):
            raise ValueError(f"it refuses a token of a valid answer, {tokenizer.decode([token])!r}")


def _reason(error: BaseException) -> str:
    """Name the first error of a chain: what was raised on its account may only guess at it."""
    while before := error.__cause__ or (not error.__suppress_context__ and error.__context__):
        error = before
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
