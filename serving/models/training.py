"""Train the model for minutes: around its rounding to few bits (QAT), and at half of its depth.

*QAT*: the weights are first spread over the steps of the 4-bit grid that a file may have left them
on, since on a grid rounding costs less, and minutes of training do not leave one. They are
fine-tuned. From there the texts are gone through once more in the same order, by a copy that stays
plain and by one with the linear layers rounded on the way forward. The gradient reaches the weights
as if they had not been rounded (the straight-through estimator, Bengio et al. 2013). Both are
rounded by the same rule, symmetric, with a scale for each `group_size` neighbours: the plain one,
which is the reference, to nearest and by GPTQ (Frantar et al. 2022), as PTQ does, and the one that
was trained for it to nearest.

*Distillation*: every other layer is kept, the last one too, and trained towards the whole model's
distribution (Hinton et al. 2015) on the same texts. That model is what the folder holds. Beside it
the same layers are trained on the texts' tokens without a teacher, in as many steps; as they learn
the few texts by heart, these are scored after each epoch. `about.json` has the losses of all on
held-out passages.

Epochs and learning rates were chosen by a part of the texts, and not by what is scored. The texts
are few: more than two epochs make the plain model worse on others, but for one more at a quarter of
the rate; QAT does better at the whole rate.

A model of more than `MOST_PARAMS` is not trained, since gradients and the optimizer's state take 16
bytes for each parameter: it is left with half of its layers, and no losses.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from serving.models import draft, making, quantize
from serving.models.draft import TargetAnswer
from serving.models.making import MakerError
from serving.models.outliers import entering, linears
from serving.models.prune import sha256
from serving.models.sparsity import losses

BITS = (4,)
DAMPING = 0.01  # of GPTQ's Hessian, as its authors have it
EPOCHS, MORE_EPOCHS, LEARNING_RATE = 2, 1, 0.0002
DISTIL_EPOCHS, DISTIL_LEARNING_RATE = 8, 0.001
BATCH = 4  # passages
FILE_GROUP = 32
SEED = 0
MOST_PARAMS = 10**9


def nearest(weight: Any, scale: Any, bits: int) -> Any:
    """Round to the nearest of 2^bits levels that are `scale` apart."""
    most = 2 ** (bits - 1)
    return (weight / scale).round().clamp(-most, most - 1) * scale


def scale_of(weight: Any, bits: int) -> Any:
    """Return the distance of levels that reach the largest of each row's weights: (rows, 1)."""
    return weight.abs().amax(-1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 0.5)


def rounded_to_nearest(weight: Any, bits: int, group: int) -> Any:
    """Round a matrix, (outputs, inputs), with a scale for each `group` neighbours of a row."""
    grouped = weight.reshape(-1, group)
    return nearest(grouped, scale_of(grouped, bits), bits).reshape(weight.shape)


def rounded_by_gptq(weight: Any, hessian: Any, bits: int, group: int) -> Any:
    """Round a matrix input by input; each error moves into the inputs not yet rounded.

    `hessian` is the sum of the outer products of the inputs, (inputs, inputs). Those with the most
    energy come first, and scales are those of the weights as they were ("static activation order").
    """
    import torch

    order, width = hessian.diag().argsort(descending=True), len(hessian)
    scales = scale_of(weight.reshape(-1, group), bits).reshape(len(weight), -1)
    scales = scales.repeat_interleave(group, dim=1).T[order]
    columns = weight.T[order]
    damped = hessian + DAMPING * hessian.diag().mean() * torch.eye(width, device=hessian.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, width, group):
        end = start + group
        block, within = columns[start:end], upper[start:end, start:end]
        errors = torch.empty_like(block)
        for place, column in enumerate(block):
            rounded = nearest(column, scales[start + place], bits)
            errors[place] = (column - rounded) / within[place, place]
            column.copy_(rounded)
            block[place + 1 :] -= torch.outer(within[place, place + 1 :], errors[place])
        columns[end:] -= upper[start:end, end:].T @ errors
    return columns[order.argsort()].T.contiguous()


@contextmanager
def replaced(model: Any, weights: Mapping[str, Any]) -> Iterator[None]:
    """Compute with other weights of the linear layers during the block.

    A gradient that is taken in it reaches the model's own weights: the straight-through estimator.
    """
    matrices = linears(model)
    kept = {name: matrices[name].weight.data for name in weights}
    for name, weight in weights.items():
        matrices[name].weight.data = weight
    try:
        yield
    finally:
        for name, weight in kept.items():
            matrices[name].weight.data = weight


def all_to_nearest(model: Any, bits: int, group: int) -> dict[str, Any]:
    """Round each linear layer's weights to nearest; the model is left as it is."""
    return {n: rounded_to_nearest(m.weight.data, bits, group) for n, m in linears(model).items()}


def all_by_gptq(model: Any, passages: Sequence[list[int]], bits: int, group: int) -> dict[str, Any]:
    """Round by GPTQ, layer by layer, by the inputs that the rounded layers before give."""
    import torch

    calls: list[tuple[Any, dict[str, Any]]] = []  # what enters a layer, of each passage
    hessians: dict[str, Any] = {}
    rounded: dict[str, Any] = {}
    matrices, layers = linears(model), model.base_model.layers

    def look(name: str, x: Any) -> Any:
        flat = x.reshape(-1, x.shape[-1]).float()
        hessians[name] = hessians.get(name, 0) + flat.T @ flat
        return x

    def catch(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        calls.append((args[0], given))

    with torch.no_grad():
        hook = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        for passage in passages:
            model.base_model(torch.tensor([passage], device=model.device), use_cache=False)
        hook.remove()
        for layer in layers:
            with entering(model, look):
                for hidden, given in calls:
                    layer(hidden, **given)
            made = {
                name: rounded_by_gptq(matrices[name].weight.data, hessian, bits, group)
                for name, hessian in hessians.items()
            }
            hessians.clear()
            with replaced(model, made):
                calls = [(layer(hidden, **given), given) for hidden, given in calls]
            rounded |= made
    return rounded


def towards_tokens(model: Any, bits: int = 0, group: int = 0) -> Callable[..., None]:
    """Return the loss of the texts' tokens (cross-entropy); with `bits`, of the rounded layers."""
    import torch

    matrix = model.get_output_embeddings().weight

    def loss(batch: Sequence[TargetAnswer]) -> None:
        tokens = torch.tensor([t for a in batch for t in a.tokens], device=model.device)
        with replaced(model, all_to_nearest(model, bits, group) if bits else {}):
            hidden = draft.states(model, batch)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=in_bf16):
                logits = hidden @ matrix.T
            torch.nn.functional.cross_entropy(logits.float(), tokens).backward()

    in_bf16 = making.computing_type() == torch.bfloat16
    return loss


def spread(weight: Any) -> Any:
    """Move weights off the grid of a 4-bit file, evenly over one of its steps.

    The file is taken to be in GGUF's Q4_1: 16 levels from the least to the largest of 32 weights.
    """
    import torch

    grouped = weight.reshape(-1, FILE_GROUP)
    step = (grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)) / 15
    return (grouped + step * (torch.rand_like(grouped) - 0.5)).reshape(weight.shape)


def make(base: Path, out: Path, source: Path) -> dict[str, Any]:
    """Study a model on texts; write what has half of its layers. Raises MakerError."""
    import torch

    config = making.read_config(base)
    making.require_16_bits(base, config)
    making.require_dense(base, config)
    layers, group = config["num_hidden_layers"], quantize.group_size(config)
    kept = [*range(0, layers - 2, 2), layers - 1]
    tokenizer, model = making.load(base)
    if model.num_parameters() > MOST_PARAMS:
        print(f"over {MOST_PARAMS:,} parameters: half of the layers stay, and nothing is trained")
        draft.keep(model, kept)
        _save(tokenizer, model, out)
        return {"layers": len(kept), "params": model.num_parameters()}
    if any(m.weight.shape[1] % group for m in linears(model).values()):
        raise MakerError(
            f"weights share a scale in groups: give widths that are a multiple of {group}"
        )
    given: dict[str, Any] = json.loads(source.read_text())
    passages, held_out = (
        [making.tokens_in(tokenizer, passage) for passage in given[of]]
        for of in ("calibration", "held_out")
    )
    passages = passages[: math.ceil(given["share"] * len(passages))]  # fewer in a quick run
    model = model.float()
    with torch.no_grad():
        texts = [
            TargetAnswer("passage", p[:1], p[1:], making.states(model, [p[:1]], [p[1:]]))
            for p in passages
        ]
    tokens = sum(len(text.tokens) for text in texts)
    nats: dict[str, list[float]] = {}
    efforts: dict[str, dict[str, float]] = {}

    def score(name: str, weights: Mapping[str, Any] = MappingProxyType({})) -> None:
        with replaced(model, weights):
            nats[name] = losses(model, held_out)
        perplexity = math.exp(sum(nats[name]) / sum(len(p) - 1 for p in held_out))
        print(f"perplexity of held-out text, {name}: {perplexity:.2f}", flush=True)

    @contextmanager
    def effort(name: str, epochs: int) -> Iterator[None]:
        began = time.monotonic()
        yield
        took_s = round(time.monotonic() - began, 1)
        efforts[name] = {"tokens": epochs * tokens, "seconds": took_s}

    def halved() -> Any:
        model = making.load(base)[1].float()
        draft.keep(model, kept)
        return model

    fit = partial(draft.fit, seed=SEED, batch=BATCH)
    score("file")
    for bits in BITS:
        score(f"file-nearest-{bits}", all_to_nearest(model, bits, group))
    torch.manual_seed(SEED)
    for module in linears(model).values():
        module.weight.data = spread(module.weight.data)
    score("spread")
    for bits in BITS:
        score(f"spread-nearest-{bits}", all_to_nearest(model, bits, group))
    with effort("plain", EPOCHS + MORE_EPOCHS):
        fit(draft.parts(model), texts, towards_tokens(model), EPOCHS, LEARNING_RATE)
        tuned = copy.deepcopy(model)
        fit(draft.parts(model), texts, towards_tokens(model), MORE_EPOCHS, LEARNING_RATE / 4)
    score("plain")
    for bits in BITS:
        score(f"plain-nearest-{bits}", all_to_nearest(model, bits, group))
        with effort(f"gptq-{bits}", 1):
            weights = all_by_gptq(model, passages, bits, group)
        score(f"plain-gptq-{bits}", weights)
    for bits in BITS:
        model = copy.deepcopy(tuned)
        with effort(f"tuned-qat-{bits}", MORE_EPOCHS):
            fit(
                draft.parts(model),
                texts,
                towards_tokens(model, bits, group),
                MORE_EPOCHS,
                LEARNING_RATE,
            )
        score(f"tuned-qat-{bits}", all_to_nearest(model, bits, group))
    model = halved()
    score("kept")
    with effort("untaught", DISTIL_EPOCHS):
        fit(
            draft.parts(model),
            texts,
            towards_tokens(model),
            DISTIL_EPOCHS,
            DISTIL_LEARNING_RATE,
            after_epoch=lambda epoch: score(f"untaught-{epoch}"),
        )
    model = halved()
    loss = draft.towards_target(model.get_output_embeddings().weight, texts, draft.by_layers(model))
    with effort("distilled", DISTIL_EPOCHS):
        fit(draft.parts(model), texts, loss, DISTIL_EPOCHS, DISTIL_LEARNING_RATE)
    _save(tokenizer, model, out)
    model = model.float()  # of what was saved, in 16 bits
    score("distilled")
    return {
        "layers": len(kept),
        "params": model.num_parameters(),
        "group_size": group,
        "passages_tokens": [len(p) - 1 for p in held_out],
        "loss_nats": nats,
        "efforts": efforts,
        "held_out_sha256": sha256(given["held_out"]),
        "calibration_sha256": sha256(given["calibration"][: len(passages)]),
        "calibration_tokens": tokens,
        "seed": SEED,
    }


def _save(tokenizer: Any, model: Any, out: Path) -> None:
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
