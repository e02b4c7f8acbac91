"""The step of a GPU that is not here, as expected, on a faster and on a slower engine.

Where the card's kernels were timed by others, and what the step needs is among them, it is put
together from these (`kernels.py`); else it follows from the card's datasheet (`datasheet.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serving.hardware.gpus import Datasheet
from serving.models.catalog import Shape
from serving.simulator import datasheet, kernels
from serving.simulator.kernels import Decoder, KernelsError
from serving.simulator.step import StepTimes
from serving.simulator.traffic import Delays

FASTER, SLOWER = 0.9, 1.06
"""The ends of a band around a step from kernels: by so many times its time real runs differed.

Measured / forecast of TPOT: 0.91 (Llama 2 7B on an H100) to 1.06 (Llama 3.1 8B on an H100 at 20
requests a second), all in 16 bits, on one GPU and below saturation: elsewhere it may be wider.
"""


DELAYS = Delays(request_s=0.006)
"""What a request costs the host of a GPU that is not here, beside the steps.

Fitted on the mean TTFT of Llama 3.1 8B on an H100 at 6, 8 and 20 requests a second: 26.0, 25.4 and
29.9 ms (github inference-sim/sim-to-real-accuracy-validation at 378810d), which judge no TTFT. At 8
it leaves 0.1 ms, at 20 it leaves 1.5 ms, about half of which are steps that take longer.
"""


def steps(
    config: Mapping[str, Any],
    shape: Shape,
    card: Datasheet,
    gpus: int = 1,
    kv_value_bytes: float | None = None,
    by_datasheet: bool = False,
) -> tuple[StepTimes, StepTimes, StepTimes]:
    """Return the step of a model on a card, or on `gpus` that share each layer, and its band.

    `config` is the model's `config.json`, and `kv_value_bytes` are the bytes of a cached number.
    Engines that are compared take all of their steps `by_datasheet` where one of them has to.
    """
    try:
        if by_datasheet:
            raise KernelsError("the steps that it is compared with have no times of kernels")
        expected = _by_kernels(config, card, gpus, kv_value_bytes)
    except KernelsError:
        eight_bit = has_eight_bit_products(config)
        expected, faster, slower = (
            datasheet.step_times(shape, card, efficiency, kv_value_bytes, eight_bit, gpus)
            for efficiency in datasheet.ENDS
        )
        return expected, faster, slower
    return expected, expected.times(FASTER), expected.times(SLOWER)


def have_kernels(
    config: Mapping[str, Any], card: Datasheet, gpus: int = 1, kv_value_bytes: float | None = None
) -> bool:
    """Tell whether times of all that a step needs were published."""
    try:
        _by_kernels(config, card, gpus, kv_value_bytes)
    except KernelsError:
        return False
    return True


def _by_kernels(
    config: Mapping[str, Any], card: Datasheet, gpus: int, kv_value_bytes: float | None
) -> StepTimes:
    eight_bit = has_eight_bit_products(config)
    if "quantization_config" in config and not eight_bit:
        raise KernelsError("no times of products with weights of 4 bits are on file")
    return kernels.step_times(
        Decoder.of(config.get("text_config", config)),
        card.short_name,
        gpus,
        eight_bit_weights=eight_bit,
        eight_bit_cache=kv_value_bytes == 1,
    )


def has_eight_bit_products(config: Mapping[str, Any]) -> bool:
    """Tell whether activations are quantized too, so that the layers multiply at 8 bits."""
    groups = config.get("quantization_config", {}).get("config_groups", {}).values()
    return any(group.get("input_activations") for group in groups)
