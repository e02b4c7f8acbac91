"""What the makers of models share: they read a source, load the base, and compute with it.

A maker is a module with `make(base, out)`, which `serving/models/__main__.py` calls.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serving.hardware import machine
from serving.models.catalog import MISTRALS, routed_experts

OTHER_FILES = ("*.json", "*.txt", "*.jinja")  # config, tokenizer, chat template, index


class MakerError(Exception):
    """The model cannot be made; the message says why and how to mend it."""


def read_prompts(source: Path) -> list[dict[str, Any]]:
    """Read prompts, each a line `{"messages": [..]}`."""
    return [json.loads(line) for line in source.read_text().splitlines()]


def read_passages(source: Path) -> list[str]:
    """Read the passages of a text, which blank lines separate."""
    return re.split(r"\n\s*\n", source.read_text().strip())


def read_config(folder: Path) -> dict[str, Any]:
    """Read a model's config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def computing_type() -> Any:
    """Return the torch type to compute in: BF16, or float32 on a CPU without instructions for it.

    What is written is in BF16 on every machine.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    return torch.float32 if not on_gpu and machine.cpu().lacks_bf16 else torch.bfloat16


def load(folder: Path) -> tuple[Any, Any]:
    """Load the tokenizer, and the model in `computing_type`, on the GPU if there is one.

    Raises MakerError where the folder does not load.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=computing_type(), attn_implementation="eager"
        )
    except (OSError, ValueError) as error:
        raise MakerError(f"{folder} is not a model folder that loads: {error}") from error
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu")


def tokens_in(tokenizer: Any, text: str) -> list[int]:
    """Return a text's tokens, without any that a tokenizer would add."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def tokens_of(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Return a chat's tokens, up to where the answer begins."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokens_in(tokenizer, text)


def answer(model: Any, prompts: Sequence[list[int]], tokens: int, **options: Any) -> Any:
    """Generate the model's greedy answers to a batch of prompts: (prompts, tokens).

    Greedy as the served engine is: without the penalty that generation_config.json may give.
    """
    import torch

    width = max(map(len, prompts))  # padded on the left and masked, to end together
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=mask.to(model.device),
            max_new_tokens=tokens,
            do_sample=False,
            repetition_penalty=1.0,
            **options,
        )
    return out[:, width:]


def states(model: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Any:
    """Compute the last hidden state before each token of the answers: (all tokens, width).

    Padding is on the right, where causal attention does not see it, so no mask is needed and the
    positions are those of serving.
    """
    import torch

    rows = [p + a[:-1] for p, a in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    in_bf16 = computing_type() == torch.bfloat16
    with torch.autocast(model.device.type, torch.bfloat16, enabled=in_bf16):
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
    per_row = zip(hidden, prompts, rows, strict=True)
    return torch.cat([h[len(p) - 1 : len(row)] for h, p, row in per_row])


def require_16_bits(base: Path, config: Mapping[str, Any]) -> None:
    """Raise MakerError where the configuration of the model is that of quantized weights."""
    if "quantization_config" in config:
        raise MakerError(f"{base.name} has quantized weights: give the model in 16 bits")


def require_dense(base: Path, config: Mapping[str, Any]) -> None:
    """Raise MakerError where the configuration of the model is that of a mixture of experts.

    Its experts are no linear layers (since transformers 5 they are one parameter of three
    dimensions), and they hold almost all of the weights.
    """
    experts, _ = routed_experts(config.get("text_config", config))
    if experts:
        raise MakerError(
            f"{base.name} is a mixture of {experts} experts, whose weights are in no linear layers:"
            " give a dense model"
        )


def copy_others(base: Path, out: Path) -> None:
    """Copy what a model folder holds beside its weights, in the Hugging Face format."""
    for path in (path for kind in OTHER_FILES for path in base.glob(kind)):
        if not any(path.match(pattern) for pattern in MISTRALS):
            shutil.copyfile(path, out / path.name)
