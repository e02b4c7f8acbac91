"""Study how outlying inputs affect 8-bit rounding.

The folder holds the figures in `about.json`, and no model.

An INT8 product rounds what enters a linear layer to 255 levels between the largest value and its
negative. A few channels of a transformer carry values many times as large as the others (Dettmers
et al. 2022): with one scale for a whole tensor they take the levels, and the rest rounds to nearly
nothing. Two cures: a scale for each token (Yao et al. 2022, ZeroQuant), which helps where tokens
differ and not where channels do; and SmoothQuant (Xiao et al. 2022), which divides each channel by
its size and multiplies the weights that meet it by the same.

The rounding is simulated in float32 and nothing else is rounded, so that only what is compared
differs. On a GPU that takes the model in 32 bits and one layer more: the weights as they were wait
in the host's memory. Where the GPU has no room for it, the study is made on the CPU. The
served kernels' own quality is measured by the labs, on the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.models import making

LEVELS = 127
SMOOTHING = 0.5  # alpha: how much of a channel's size moves into the weights
CALIBRATED = 3  # every third passage gives the scales, the others are scored


@dataclass(frozen=True)
class Inputs:
    """Holds the largest magnitude of each channel that entered a linear layer, and mean kurtosis.

    `kurtosis` is that of a token's values over the channels (3 for a normal distribution), the mean
    over tokens; `peak` is (channels,).
    """

    peak: Any
    kurtosis: float

    @property
    def largest_over_median(self) -> float:
        """Return the largest channel's magnitude over the median channel's."""
        return float(self.peak.max() / self.peak.median())


def rounded(values: Any, scale: Any) -> Any:
    """Round values to the nearest of 255 levels that are `scale` apart."""
    import torch

    scale = torch.clamp(scale, min=1e-12)
    return torch.clamp(torch.round(values / scale), -LEVELS, LEVELS) * scale


def linears(model: Any) -> dict[str, Any]:
    """Find the linear layers that are quantized: all but the output matrix."""
    import torch

    output = model.get_output_embeddings()
    modules = model.named_modules()
    return {n: m for n, m in modules if isinstance(m, torch.nn.Linear) and m is not output}


@contextmanager
def entering(model: Any, change: Callable[[str, Any], Any]) -> Iterator[None]:
    """Replace the input of each linear layer by `change(layer's name, input)` during the block."""

    def hook(name: str) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda _, args: (change(name, args[0]), *args[1:])

    hooks = [m.register_forward_pre_hook(hook(n)) for n, m in linears(model).items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def observe(model: Any, passages: Sequence[list[int]]) -> dict[str, Inputs]:
    """Run passages through the model; return what enters each linear layer, by its name."""
    import torch

    peaks = dict[str, Any]()
    kurtoses = dict[str, list[Any]]()

    def look(name: str, x: Any) -> Any:
        flat = x.reshape(-1, x.shape[-1])
        peak = flat.abs().amax(0)
        peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak
        centred = flat - flat.mean(-1, keepdim=True)
        kurtosis = centred.pow(4).mean(-1) / centred.pow(2).mean(-1).pow(2)
        kurtoses.setdefault(name, []).append(kurtosis)
        return x

    with entering(model, look):
        for passage in passages:
            losses(model, passage)
    return {n: Inputs(peaks[n], float(torch.cat(kurtoses[n]).mean())) for n in peaks}


def losses(model: Any, passage: list[int]) -> list[float]:
    """Compute the negative log-likelihood of each token from the second on, in nats."""
    import torch

    ids = torch.tensor([passage], device=model.device)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        per_token: list[float] = torch.nn.functional.cross_entropy(
            logits, ids[0, 1:], reduction="none"
        ).tolist()
    return per_token


def on_host(model: Any) -> dict[str, Any]:
    """Copy the weights of the linear layers into the host's memory, by the layers' names."""
    return {n: m.weight.data.to("cpu", copy=True) for n, m in linears(model).items()}


def in_float32(model: Any) -> Any:
    """Return the model in float32: on the CPU where its GPU has no room for that."""
    import torch

    if model.device.type == "cuda":
        sizes = [p.numel() for p in model.parameters()]
        # 4 bytes a weight in place of 2, and a layer's copies while it is rounded
        more = 2 * sum(sizes) + 4 * 4 * max(sizes)
        free, _ = torch.cuda.mem_get_info()
        if free < more:
            print(
                f"the GPU has {free / 1e9:.1f} GB free, and float32 takes {more / 1e9:.1f} GB more:"
                " this goes on on the CPU, which takes longer",
                flush=True,
            )
            model = model.to("cpu")
    return model.float()


@contextmanager
def scheme(
    model: Any, inputs: dict[str, Inputs], original: Mapping[str, Any], name: str
) -> Iterator[None]:
    """Round the model by one of `SCHEMES` during the block, and restore it afterwards.

    `original` holds its weights, as `on_host` gives them.
    """
    import torch

    layers = linears(model)
    smooth = {n: torch.ones_like(inputs[n].peak) for n in layers}
    for n, layer in layers.items():
        weight = layer.weight.data
        if "smoothed" in name:
            sizes = weight.abs().amax(0).clamp(min=1e-5)  # of the weights that meet each channel
            smooth[n] = (inputs[n].peak.clamp(min=1e-5) ** SMOOTHING) / (sizes ** (1 - SMOOTHING))
        weight *= smooth[n]
        largest = weight.abs().amax() if "weights by tensor" in name else weight.abs().amax(1, True)
        weight.copy_(rounded(weight, largest / LEVELS))

    def enter(n: str, x: Any) -> Any:
        if "activations" not in name:
            return x
        x = x / smooth[n]
        if "by token" in name:
            return rounded(x, x.abs().amax(-1, keepdim=True) / LEVELS)
        return rounded(x, (inputs[n].peak / smooth[n]).amax() / LEVELS)

    try:
        with entering(model, enter):
            yield
    finally:
        for n, layer in layers.items():
            layer.weight.data.copy_(original[n])


SCHEMES = (
    "weights by channel",
    "weights by tensor",
    "activations by token, weights by channel",
    "activations by tensor, weights by channel",
    "activations by tensor, smoothed, weights by channel",
)


def make(base: Path, out: Path, source: Path) -> dict[str, Any]:
    """Study a model on a text; nothing is written to `out`. Raises MakerError."""
    making.require_dense(base, making.read_config(base))
    passages = making.read_passages(source)
    tokenizer, model = making.load(base)
    original = on_host(model)  # in 16 bits, from which float32 is restored exactly
    model = in_float32(model)
    tokens = [making.tokens_in(tokenizer, passage) for passage in passages]
    calibrating = tokens[::CALIBRATED]
    scored = [t for i, t in enumerate(tokens) if i % CALIBRATED]
    print(f"watching what enters {len(linears(model))} linear layers", flush=True)
    inputs = observe(model, calibrating)
    loss = {"none": [losses(model, p) for p in scored]}
    for name in SCHEMES:
        print(f"scoring with rounded {name}", flush=True)
        with scheme(model, inputs, original, name):
            loss[name] = [losses(model, p) for p in scored]
    kinds = dict[str, list[Inputs]]()
    for name, layer_inputs in inputs.items():
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append(layer_inputs)
    return {
        "inputs": {
            kind: {
                "kurtosis_mean": sum(i.kurtosis for i in of_kind) / len(of_kind),
                "kurtosis_max": max(i.kurtosis for i in of_kind),
                "largest_over_median_max": max(i.largest_over_median for i in of_kind),
            }
            for kind, of_kind in kinds.items()
        },
        "passages_tokens": [len(p) - 1 for p in scored],
        "loss_nats": {name: [sum(p) for p in by_passage] for name, by_passage in loss.items()},
        "text": source.name,
    }
