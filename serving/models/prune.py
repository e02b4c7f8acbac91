"""Zeros in the weights.

A method is how weights are chosen and which share of them goes: `magnitude-50` or `wanda-2-4`.
*Magnitude* drops the smallest weights of each matrix, in percent (Han et al. 2015). *Wanda* (Sun et
al., "A Simple and Effective Pruning Approach for Large Language Models", 2023) multiplies each
weight's magnitude by the norm of the input that it meets on a calibration text, and drops the
smallest products of each row, which is what one output is computed from. `2-4` leaves two of four
neighbours in a row, the pattern that NVIDIA's sparse tensor cores read (Mishra et al. 2021).
Neither method changes a weight that stays.

The model folder has the same files in the same sizes: the zeros are stored. All linear layers are
pruned except the output matrix, as in the papers; a mixture of experts is refused. Wanda's
inputs are those of the whole model, seen once; its authors go layer by layer and see the inputs
that the pruned layers before give.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.models import catalog, making
from serving.models.making import MakerError
from serving.models.outliers import entering, linears

SELECTIONS = ("magnitude", "wanda")
PERCENTS = (10, 20, 30, 40, 50, 60, 70)
PATTERNS = (*map(str, PERCENTS), "2-4")
METHODS = tuple(f"{by}-{pattern}" for by in SELECTIONS for pattern in PATTERNS)
SEQUENCES, SEQUENCE_TOKENS = 16, 128  # of the calibration text; Wanda needs few, by its paper
GROUP, KEPT = 4, 2  # of the pattern 2:4


@dataclass(frozen=True)
class Method:
    """How weights are chosen, and which of them: a share in percent, or two of each four."""

    by: str
    pattern: str

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read `wanda-50`. Raises MakerError for another method, with the known ones."""
        by, _, pattern = text.partition("-")
        if by not in SELECTIONS or pattern not in PATTERNS:
            raise MakerError(f"there is no way {text!r} to prune; known: {', '.join(METHODS)}")
        return cls(by, pattern)

    @property
    def share(self) -> float:
        """The share of weights that become zero."""
        return 1 - KEPT / GROUP if self.pattern == "2-4" else int(self.pattern) / 100

    def __str__(self) -> str:
        return f"{self.by}-{self.pattern}"


def dropped(scores: Any, method: Method) -> Any:
    """Mark the weights that go, (outputs, inputs), by their scores: the lowest go.

    Of the whole matrix by magnitude, of each row by Wanda, of four neighbours in a row by the
    pattern 2:4, whatever the score.
    """
    import torch

    rows, columns = scores.shape
    if method.pattern == "2-4":
        scores = scores.reshape(-1, GROUP)
        count = GROUP - KEPT
    elif method.by == "wanda":
        count = int(columns * method.share)
    else:
        scores = scores.reshape(1, -1)
        count = int(rows * columns * method.share)
    lowest = scores.topk(count, dim=1, largest=False).indices
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, lowest, value=True).reshape(rows, columns)


def input_norms(model: Any, sequences: Any) -> dict[str, Any]:
    """Return the norm of each channel that enters a linear layer: {layer: (inputs,)}.

    `sequences` are tokens, (sequences, tokens), that the model sees once.
    """
    import torch

    squares: dict[str, Any] = {}

    def look(name: str, x: Any) -> Any:
        square = x.reshape(-1, x.shape[-1]).float().pow(2).sum(0)
        squares[name] = squares[name] + square if name in squares else square
        return x

    with entering(model, look), torch.no_grad():
        model.base_model(sequences.to(model.device), use_cache=False)
    return {name: square.sqrt() for name, square in squares.items()}


def prune(model: Any, method: Method, norms: Mapping[str, Any]) -> float:
    """Prune a loaded model in place; return the share of the weights' energy that went.

    The energy is the sum of the squares of all weights that could go; `norms`, which Wanda needs,
    are those of the whole model's inputs. Raises MakerError where the pattern fits no matrix.
    """
    layers, gone, before = linears(model), 0.0, 0.0
    if method.pattern == "2-4" and any(m.weight.shape[1] % GROUP for m in layers.values()):
        raise MakerError(
            "the pattern 2:4 needs matrices whose rows are a multiple of four long: choose a method"
            " that drops a share in percent"
        )
    for name, module in layers.items():
        weight = module.weight.data
        scores = weight.float().abs()
        mask = dropped(scores * norms[name] if method.by == "wanda" else scores, method)
        squares = scores.pow(2)
        gone, before = gone + float(squares[mask].sum()), before + float(squares.sum())
        weight[mask] = 0
    return gone / before


def load(base: Path) -> tuple[Any, Any]:
    """Load tokenizer and model: in BF16 on a GPU, in float32 on a CPU, where not all have BF16.

    Raises MakerError.
    """
    tokenizer, model = making.load(base)
    return tokenizer, model if model.device.type == "cuda" else model.float()


def sequences_of(tokenizer: Any, text: str) -> Any:
    """Cut a text's tokens into equal sequences, (sequences, tokens)."""
    import torch

    tokens = making.tokens_in(tokenizer, text)
    count = min(SEQUENCES, len(tokens) // SEQUENCE_TOKENS)
    return torch.tensor(tokens[: count * SEQUENCE_TOKENS]).reshape(count, SEQUENCE_TOKENS)


@dataclass
class Zeros:
    """Counts what a file of weights holds of zeros, among the matrices that were pruned."""

    weights: int = 0
    zeros: int = 0
    groups_too_full: int = 0  # of four neighbours, with more than two that are not zero
    matrices: int = 0
    rows: int = 0

    def count(self, weight: Any) -> None:
        self.matrices, self.rows = self.matrices + 1, self.rows + weight.shape[0]
        self.weights += weight.numel()
        self.zeros += int((weight == 0).sum())
        if weight.shape[1] % GROUP == 0:
            left = (weight.reshape(-1, GROUP) != 0).sum(1)
            self.groups_too_full += int((left > KEPT).sum())

    @property
    def share(self) -> float:
        return self.zeros / self.weights


def make(base: Path, out: Path, method: str, source: Path) -> dict[str, Any]:
    """Write the pruned model. Raises MakerError."""
    from safetensors.torch import load_file, save_file

    wanted = Method.parse(method)
    config = making.read_config(base)
    making.require_16_bits(base, config)
    making.require_dense(base, config)
    text = source.read_text()
    tokenizer, model = load(base)
    print(f"pruning {len(linears(model))} matrices: {method}", flush=True)
    sequences = sequences_of(tokenizer, text)
    norms = input_norms(model, sequences) if wanted.by == "wanda" else {}
    energy = prune(model, wanted, norms)
    zeros = {f"{name}.weight": (m.weight == 0).cpu() for name, m in linears(model).items()}
    written, total = Zeros(), 0
    for shard in catalog.shards(base):
        tensors = load_file(shard)
        mine = [name for name in tensors if name in zeros]
        for name in mine:
            tensors[name][zeros.pop(name)] = 0  # the others stay as they were stored
        save_file(tensors, out / shard.name, metadata={"format": "pt"})
        stored = load_file(out / shard.name)  # what is served, and not what was meant to be
        for name in mine:
            written.count(stored[name])
        total += sum(t.numel() for t in stored.values())
    if zeros:
        raise MakerError(f"{base} stores no {next(iter(zeros))}: its weights have other names")
    making.copy_others(base, out)
    _require(written, wanted)
    print(f"{written.share:.1%} of {written.weights / 1e6:,.0f} M weights are zero", flush=True)
    calibrated = wanted.by == "wanda"
    return {
        "method": method,
        "asked": wanted.share,
        "zeros": written.share,
        "groups_too_full": written.groups_too_full,
        "pruned_params": written.weights,
        "params": total,
        "energy_gone": energy,
        "calibration": source.name if calibrated else "",
        "calibration_sha256": sha256(text) if calibrated else "",
        "calibration_tokens": sequences.numel() if calibrated else 0,
    }


def _require(written: Zeros, wanted: Method) -> None:
    """Raise MakerError where the written weights do not hold the zeros that were asked for."""
    whole = written.weights * wanted.share
    if written.zeros < whole - written.rows - written.matrices:  # a part of a weight stays
        raise MakerError(f"{written.share:.2%} of the written weights are zero, for {wanted}")
    if wanted.pattern == "2-4" and written.groups_too_full:
        raise MakerError(f"{written.groups_too_full} groups of four have more than two weights")


def sha256(text: str | Sequence[str]) -> str:
    """Hash a text, or passages as they stand in one: with a blank line between them."""
    whole = text if isinstance(text, str) else "\n\n".join(text)
    return hashlib.sha256(re.sub(r"\s+\Z", "", whole).encode()).hexdigest()
