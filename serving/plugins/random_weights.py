"""Fills quantized weights with random numbers of a true distribution, in vLLM's own worker.

vLLM's `--load-format dummy` draws 16-bit weights, but it leaves integers as the memory was, often
zero, and casts numbers of at most 0.001 to FP8, where 97.7% of them become zero. A GPU multiplies
zeros faster and with less power, so such weights flatter every figure. Here they are drawn as
quantizing normally distributed weights gives them: each channel or group scaled so that its largest
weight takes the largest value. The scales are set to go with them.

Every worker of vLLM imports `serving/plugins/vllm_worker.py` before the model is loaded, which has
this done. The share of zeros that was then found is written to the engine's log,
by bits a weight; the lab reads it there, and no verdict appears without it
(`labs/harness/analysis/checks.toml`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from serving.metrics import EVEN_ROUTING

EXTENSION = "serving.plugins.vllm_worker.RandomWeights"  # for --worker-extension-cls, 0.26 and 0.32
ROUTING = "VLLM_MOE_ROUTING_SIMULATION_STRATEGY"
ROUTED = "Simulating MoE routing using a {} strategy."
"""How vLLM's log tells, once, that a router of its model has asked a strategy for experts."""
STD = 1e-3 / 3**0.5  # of the 16-bit weights that vLLM draws: uniform within 0.001
# The largest of n normal numbers is about so many standard deviations off (n: a channel's 4,096, a
# group's 128), and becomes the largest value of the type.
CHANNEL, GROUP = 3.6, 2.6
INT8_SIGMA, FP8_SIGMA, INT4_SIGMA = 127 / CHANNEL, 448 / CHANNEL, 7 / GROUP
MOST_ZEROS = {4: 0.25, 8: 0.05, 16: 0.01}
"""The largest share of zeros of drawn weights, by bits. Normal weights have 15% at 4 bits (the
values within half a step of 2.7 steps' deviation), 1.1% as 8-bit integers, none in FP8."""
SAMPLE = 1 << 20  # numbers of a weight that are looked at for zeros
SEED = 1234
WEIGHTS = re.compile(r"(?:^|[._])(?:weight|weight_packed|qweight)$")
SCALES = re.compile(r"(?:^|\.)(?:weight_scale|scales)$")
LINE = re.compile(r"Random weights, share of zeros:((?: \d+ bits \d\.\d+)+)")


def fill(model: Any) -> dict[int, float]:
    """Draw the quantized weights of a loaded model; return the share of zeros by bits a weight."""
    import torch

    zeros: dict[int, list[float]] = {}
    bits_of: dict[str, int] = {}  # layer -> bits of its weight
    named = dict(model.named_parameters())
    with torch.no_grad():
        for number, (name, parameter) in enumerate(named.items()):
            if WEIGHTS.search(name) and parameter.device.type != "meta" and parameter.dim() > 1:
                bits = _draw(parameter.data, SEED + number)
                bits_of[name.rpartition(".")[0]] = bits
                zeros.setdefault(bits, []).append(_zeros(parameter.data, bits))
        for name, parameter in named.items():
            layer = name.rpartition(".")[0]
            if SCALES.search(name) and bits_of.get(layer, 16) < 16:
                weight = next(
                    w
                    for n, w in named.items()
                    if n.rpartition(".")[0] == layer and WEIGHTS.search(n)
                )
                parameter.data.fill_(STD / _sigma(weight.data))
    return {bits: max(shares) for bits, shares in zeros.items()}


def _sigma(weight: Any) -> float:
    import torch

    if weight.dtype == torch.int32:
        return INT4_SIGMA
    return INT8_SIGMA if weight.dtype == torch.int8 else FP8_SIGMA


def _draw(weight: Any, seed: int) -> int:
    """Fill a quantized weight; return its bits. One of 16 bits or more is left as it is."""
    import torch

    generator = torch.Generator(device=weight.device).manual_seed(seed)

    def normal(sigma: float) -> Any:
        drawn = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        return drawn.normal_(0, sigma, generator=generator)

    if weight.dtype == torch.int8:
        weight.copy_(normal(INT8_SIGMA).round_().clamp_(-127, 127))
        return 8
    if weight.dtype == torch.int32:  # eight numbers of 4 bits, each with 8 added
        weight.zero_()
        for place in range(8):
            number = (normal(INT4_SIGMA).round_().clamp_(-8, 7) + 8).to(torch.int32)
            weight.bitwise_or_(number << (4 * place))
        return 4
    if weight.dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):
        most = torch.finfo(weight.dtype).max
        weight.copy_(normal(FP8_SIGMA).clamp_(-most, most).to(weight.dtype))
        return 8
    return 16


def _zeros(weight: Any, bits: int) -> float:
    """Return the share of zeros in a sample of a weight, spread over all of it."""
    import torch

    flat = weight.reshape(-1)
    flat = flat[:: max(1, flat.numel() // SAMPLE)]
    if bits == 4:
        places = torch.arange(0, 32, 4, device=flat.device)
        return float(((flat[:, None] >> places & 15) == 8).float().mean())
    return float((flat.float() == 0).float().mean())


def line(zeros: Mapping[int, float]) -> str:
    """Write the shares of zeros as the line of the log that `read` reads."""
    shares = "".join(f" {bits} bits {share:.4f}" for bits, share in sorted(zeros.items()))
    return f"Random weights, share of zeros:{shares}"


def read(text: str) -> dict[str, str]:
    """Read bits -> share of zeros, the largest of all workers' and models'; empty without any."""
    shares: dict[str, str] = {}
    for match in LINE.finditer(text):
        for bits, share in re.findall(r"(\d+) bits (\d\.\d+)", match[1]):
            shares[bits] = max(shares.get(bits, "0"), share)
    return shares


def fault(shares: Mapping[str, str]) -> str:
    """Say what is wrong with the weights that an engine drew; empty where nothing is."""
    if not shares:
        return "the engine does not say how many of its random weights are zero"
    for bits, share in shares.items():
        if float(share) > MOST_ZEROS[int(bits)]:
            return f"{float(share):.1%} of the random {bits}-bit weights are zero"
    return ""


class EvenRouting:
    """Sends each token of a mixture to different experts, drawn evenly.

    A strategy of vLLM's `RoutingSimulator`, for vLLM's own `uniform_random` may send a token to one
    expert twice (0.26), so that a step needs fewer, or has ids of 64 bits (0.32), which vLLM's
    kernel for experts on a CPU refuses.
    """

    def route_tokens(
        self, hidden_states: Any, router_logits: Any, top_k: int, indices_type: Any = None
    ) -> tuple[Any, Any]:
        """Return (weights, ids) of each token's experts, both of shape (tokens, top_k).

        The ids have 32 bits unless a kernel asks for others. All weights are 1.
        """
        import torch

        drawn = torch.rand(router_logits.shape, device=router_logits.device)
        ids = drawn.topk(top_k, dim=-1).indices.to(indices_type or torch.int32)
        return torch.ones(ids.shape, dtype=torch.float32, device=ids.device), ids


def register_even_routing() -> None:
    """Make `EvenRouting` known to vLLM; a model that is then built with ROUTING set has it."""
    from vllm.model_executor.layers.fused_moe.router.routing_simulator_router import (
        RoutingSimulator,
    )

    RoutingSimulator.register_strategy(EVEN_ROUTING, EvenRouting())


def filled(load: Callable[..., None]) -> Callable[..., None]:
    """Wrap the loading of vLLM's dummy loader: the quantized weights are drawn after it."""

    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        load(self, model, model_config)
        print(line(fill(model)), flush=True)

    return load_weights
