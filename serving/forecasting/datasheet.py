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
  78% of the bandwidth, leaves 1.5 ms.

None of these figures comes from this lab. What is not covered: adapters, several devices, the
all-to-all of routed experts, eager execution (no published cost of its launches), and kernels that
are slow at some sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

from serving.forecasting.step import StepTimes
from serving.gpus import Datasheet
from serving.models import Shape

SIZES = tuple(2**i for i in range(15))  # of steps, in tokens, and of rows of the output head


@dataclass(frozen=True)
class Efficiency:
    """Holds which share of a datasheet's figures an engine reaches, and its fixed time per step."""

    reading: float  # of the memory bandwidth
    computing: float  # of the dense rate
    step_s: float


EXPECTED = Efficiency(reading=0.85, computing=0.51, step_s=1.2e-3)
FASTER = Efficiency(reading=0.92, computing=0.75, step_s=0.4e-3)
SLOWER = Efficiency(reading=0.78, computing=0.43, step_s=1.6e-3)


def step_times(
    shape: Shape,
    card: Datasheet,
    efficiency: Efficiency,
    kv_value_bytes: float = 2,
    eight_bit: bool = False,
) -> StepTimes:
    """Compute the parts of a step of `shape` on `card`.

    `kv_value_bytes` are the bytes of a cached number. With `eight_bit` the layers multiply at the
    card's FP8 rate, or at its BF16 rate where it has none; the output head and attention stay
    in BF16.
    """
    bandwidth = card.memory_bandwidth_bytes_per_s * efficiency.reading
    bf16 = card.bf16_flops_per_s * efficiency.computing
    linear = (card.fp8_flops_per_s or card.bf16_flops_per_s) * efficiency.computing
    linear = linear if eight_bit else bf16
    head_bytes = 2 * shape.head_params
    layer_params = shape.matmul_params - shape.head_params
    attention_flops_per_pair = 4 * shape.layers * shape.heads * shape.head_dim
    return StepTimes(
        tokens=SIZES,
        linear_s=tuple(
            max((shape.step_bytes(n) - head_bytes) / bandwidth, 2 * layer_params * n / linear)
            for n in SIZES
        ),
        rows=SIZES,
        head_s=tuple(max(head_bytes / bandwidth, 2 * shape.head_params * n / bf16) for n in SIZES),
        attention_pair_s=attention_flops_per_pair / bf16,
        attention_read_s=shape.kv_bytes_per_token(kv_value_bytes) / bandwidth,
        scheduling_s=efficiency.step_s,
    )
