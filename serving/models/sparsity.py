"""Study what pruning costs at every sparsity.

The folder holds the figures in `about.json`, and no model. Its source has the passages that Wanda
is calibrated on, other passages that are scored, and blocks of tasks, whose first lines are
examples: {"calibration": [..], "held_out": [..], "tasks": [[[question, answer], ..], ..],
"examples": 3}.

The model is loaded once, pruned by each method of `serving/models/prune.py` in turn, scored, and
restored. So sixteen pruned models take a minute or two and no engine. Some of them are served as
well, where the lab measures speed and quality on the engine. Tasks are asked where half of the
weights are zero.

A task counts as solved where greedy decoding continues its question with exactly the answer and a
new line. The lines before it in its block stand before it with their right answers, so a whole
block is scored in one pass: each token of an answer must be the likeliest after those before it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving.models import making
from serving.models.outliers import linears
from serving.models.prune import (
    METHODS,
    Method,
    Zeros,
    input_norms,
    load,
    prune,
    sequences_of,
    sha256,
)

SCORED_TOKENS = 96  # of each held-out passage: on two cores a study of whole ones takes minutes
TASKS_AT = ("50", "2-4")  # the patterns at which tasks are asked as well


def losses(model: Any, passages: Sequence[list[int]]) -> list[float]:
    """Compute the negative log-likelihood of each passage, from its second token on, in nats."""
    import torch

    total = []
    with torch.no_grad():
        for hidden, ids in zip(states(model, passages), passages, strict=True):
            logits = model.get_output_embeddings()(hidden[: len(ids) - 1]).float()
            wanted = torch.tensor(ids[1:], device=model.device)
            total.append(float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")))
    return total


def solved(
    tokenizer: Any, model: Any, blocks: Sequence[Sequence[Sequence[str]]], examples: int
) -> list[bool]:
    """Tell of each task, but the examples, whether greedy decoding gives its answer and no more."""
    import torch

    rows: list[list[int]] = []
    places: list[list[tuple[int, int]]] = []  # of each answer with its new line
    for block in blocks:
        row: list[int] = []
        lines = []
        for question, answer in block:
            asked = making.tokens_in(tokenizer, question)
            line = making.tokens_in(tokenizer, f" {answer}\n")
            row += asked + line
            lines.append((len(row) - len(line), len(row)))
        rows.append(row)
        places.append(lines[examples:])
    right = []
    with torch.no_grad():
        for hidden, row, lines in zip(states(model, rows), rows, places, strict=True):
            for first, end in lines:  # what follows each token is at its place
                logits = model.get_output_embeddings()(hidden[first - 1 : end - 1])
                predicted = logits.argmax(-1).tolist()
                # a likelier token may hold more line ends than one
                ends = tokenizer.decode(predicted[-1:]).startswith("\n")
                right.append(predicted[:-1] == row[first : end - 1] and ends)
    return right


def states(model: Any, rows: Sequence[list[int]]) -> Any:
    """Compute the last hidden states of rows of tokens, (rows, longest, width), padded at the end.

    Causal attention does not see padding on the right, so no mask is needed.
    """
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    with torch.no_grad():
        return model.base_model(ids, use_cache=False).last_hidden_state


def make(base: Path, out: Path, source: Path, methods: Sequence[str] = METHODS) -> dict[str, Any]:
    """Study a model on texts; nothing is written to `out`. Raises MakerError."""
    making.require_dense(base, making.read_config(base))
    given: dict[str, Any] = json.loads(source.read_text())
    tokenizer, model = load(base)
    passages = [making.tokens_in(tokenizer, p)[:SCORED_TOKENS] for p in given["held_out"]]
    sequences = sequences_of(tokenizer, "\n\n".join(given["calibration"]))
    norms = input_norms(model, sequences)
    matrices = linears(model)
    # beside the model, so that it is restored at once; on a GPU there may be no room for both
    original = {name: m.weight.data.to("cpu", copy=True) for name, m in matrices.items()}
    nats: dict[str, list[float]] = {}
    right: dict[str, list[bool]] = {}

    def score(name: str) -> None:
        nats[name] = losses(model, passages)
        if name == "dense" or Method.parse(name).pattern in TASKS_AT:
            right[name] = solved(tokenizer, model, given["tasks"], given["examples"])

    zeros, energy = {"dense": 0.0}, {"dense": 0.0}
    score("dense")
    for number, name in enumerate(methods, 1):
        energy[name] = prune(model, Method.parse(name), norms)
        counted = Zeros()
        for module in matrices.values():
            counted.count(module.weight.data)
        zeros[name] = counted.share
        score(name)
        for of, module in matrices.items():
            module.weight.data.copy_(original[of])
        print(f"{number} of {len(methods)} scored: {name}", flush=True)
    return {
        "passages_tokens": [len(p) - 1 for p in passages],
        "loss_nats": nats,
        "solved": right,
        "zeros": zeros,
        "energy_gone": energy,
        "pruned_params": sum(w.numel() for w in original.values()),
        "held_out_sha256": sha256(given["held_out"]),
        "calibration_sha256": sha256(given["calibration"]),
        "calibration_tokens": sequences.numel(),
    }
