"""The step of a GPU that is not here, from its datasheet and published efficiencies.

A step takes the longer of reading (weights, keys and values) and computing, each at a share of the
vendor's figure that engines were seen to reach, and a fixed time for the host and the launches:

- **reading** at 85% of the datasheet's bandwidth: TinyChat's 4-bit decode on an RTX 4090 (AWQ, Lin
  et al., MLSys 2024). Between 78% (the single-kernel Llama 1B of Hazy Research on an H100, 2025)
  and 92%.
- **computing** at 51% of the datasheet's dense rate: vLLM's BF16 prefill of an 8B model on an
  H100. Between 43% (TensorRT-LLM, the same model in FP8) and 75% (FlashAttention-3 alone: 740 of
  989 TFLOP/s, Shah et al. 2024).
- **1.2 ms** a step beside both: what is left of vLLM's 155 tokens/s for one stream of an 8B model
  in BF16 on an H100 after reading at 85%. Between 0.4 ms, where scheduling overlaps the step, and
  1.6 ms: a 1B model, for which Hazy Research found vLLM 2.5 times slower than a kernel that reaches
  78% of the bandwidth, leaves 1.5 ms. A pass of a draft model is launched and not scheduled: it
  takes 0.4 ms of that on any of these engines (`as_draft`).

Where several GPUs share each layer (tensor parallelism), each reads and computes an equal part, and
they exchange results over NVLink: they add up two vectors a token in each layer, and one for the
embeddings (Megatron-LM, Shoeybi et al. 2019), and gather the logits. An exchange takes

- **10 us** and, of what it sends, the time at **76%** of NVLink's bandwidth one way: the fastest of
  vLLM's all-reduces of 0.5 to 4 MiB on six H100, 13 to 31 us, in a straight line (vLLM's pull
  request 24111, 2025). Between 4 us, SGLang's kernel of 4 KiB on four H100 (its pull request 2904,
  2025), at 81% (366 of 450 GB/s for large sizes on four H100, nccl-collectives-bench, 2026), and
  19 us at 45%, which is NCCL's line in the same table of vLLM's.

None of these figures comes from this lab. What is not covered: adapters, exchanges that overlap
with computing, GPUs without NVLink or in several machines, the all-to-all of routed experts, eager
execution (no published cost of its launches), and kernels that are slow at some sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from serving.hardware.gpus import Datasheet
from serving.models.catalog import Shape
from serving.simulator.step import StepTimes

MOST_LINKED = 8  # GPUs that NVLink joins in one machine
SIZES = tuple(2**i for i in range(15))  # of steps, in tokens, and of rows; with the ridge's own


@dataclass(frozen=True)
class Efficiency:
    """Holds which share of a datasheet's figures an engine reaches, and its fixed time per step."""

    reading: float  # of the memory bandwidth
    computing: float  # of the dense rate
    step_s: float
    linking: float  # of NVLink's bandwidth
    exchange_s: float  # of an exchange between GPUs, beside what it sends


EXPECTED = Efficiency(0.85, 0.51, step_s=1.2e-3, linking=0.76, exchange_s=10e-6)
MOST_EFFICIENT = Efficiency(0.92, 0.75, step_s=0.4e-3, linking=0.81, exchange_s=4e-6)
LEAST_EFFICIENT = Efficiency(0.78, 0.43, step_s=1.6e-3, linking=0.45, exchange_s=19e-6)
ENDS = (EXPECTED, MOST_EFFICIENT, LEAST_EFFICIENT)
"""The steps of a band: as expected, on a faster and on a slower engine."""


def as_draft(times: StepTimes) -> StepTimes:
    """Return the times of a draft model's pass, which the target's step has scheduled already."""
    launches_s = min(times.scheduling_s, MOST_EFFICIENT.step_s)
    return times.model_copy(update={"scheduling_s": launches_s})


def reason_against_sharing(shape: Shape, card: Datasheet, gpus: int) -> str | None:
    """Say why so many of these GPUs cannot share a model's layers; None where they can."""
    if gpus == 1:
        return None
    if card.link_bytes_per_s is None:
        return (
            f"GPUs that share a layer are forecast over NVLink, which the {card.short_name} does"
            " not have; no published figures were found for PCIe"
        )
    if gpus > MOST_LINKED:
        return f"NVLink joins {MOST_LINKED} GPUs of a machine at most"
    if shape.heads % gpus or shape.kv_heads % gpus:
        return (
            f"{gpus} GPUs cannot share {shape.heads} heads and {shape.kv_heads} KV heads evenly;"
            " choose a number that divides both"
        )
    return None


def step_times(
    shape: Shape,
    card: Datasheet,
    efficiency: Efficiency,
    kv_value_bytes: float | None = None,
    eight_bit: bool = False,
    gpus: int = 1,
) -> StepTimes:
    """Compute the parts of a step of `shape` on `card`, or on `gpus` of them that share each layer.

    `kv_value_bytes` are the bytes of a cached number. With `eight_bit` the layers multiply at the
    card's FP8 rate, or at its BF16 rate where it has none; the output head and attention stay
    in BF16.
    """
    bandwidth = gpus * card.memory_bandwidth_bytes_per_s * efficiency.reading
    bf16 = gpus * card.bf16_flops_per_s * efficiency.computing
    linear = gpus * (card.fp8_flops_per_s or card.bf16_flops_per_s) * efficiency.computing
    linear = linear if eight_bit else bf16
    head_bytes = 2 * shape.head_params
    layer_params = shape.matmul_params - shape.head_params

    def exchange_s(all_bytes: float) -> float:
        """Of an exchange in which every GPU sends all of these bytes but its own part."""
        if gpus == 1:
            return 0.0
        assert card.link_bytes_per_s, "a caller asks for several GPUs only where they are linked"
        sent_bytes = all_bytes * (gpus - 1) / gpus
        return efficiency.exchange_s + sent_bytes / (card.link_bytes_per_s * efficiency.linking)

    def sizes(read_bytes: float, params: float, flops_per_s: float) -> tuple[int, ...]:
        """Add the tokens from which computing takes longer than reading: a bend."""
        ridge = math.ceil(read_bytes / bandwidth * flops_per_s / (2 * params))
        return tuple(sorted({*SIZES, min(max(ridge, 1), SIZES[-1])}))

    tokens = sizes(shape.step_bytes(SIZES[-1]) - head_bytes, layer_params, linear)
    rows = sizes(head_bytes, shape.head_params, bf16)
    attention_flops_per_pair = 4 * shape.layers * shape.heads * shape.head_dim
    return StepTimes(
        tokens=tokens,
        linear_s=tuple(
            max((shape.step_bytes(n) - head_bytes) / bandwidth, 2 * layer_params * n / linear)
            + (2 * shape.layers + 1) * exchange_s(2 * shape.hidden * n * 2)
            for n in tokens
        ),
        rows=rows,
        head_s=tuple(
            max(head_bytes / bandwidth, 2 * shape.head_params * n / bf16)
            + exchange_s(shape.vocab * n * 2)
            for n in rows
        ),
        attention_pair_s=attention_flops_per_pair / bf16,
        attention_read_s=shape.kv_bytes_per_token(kv_value_bytes) / bandwidth,
        scheduling_s=efficiency.step_s,
    )
