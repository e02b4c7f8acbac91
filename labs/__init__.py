"""What is asked: the labs, and the machinery that runs, judges and reports them."""

from labs import (
    chunked_prefill,
    continuous_batching,
    kv_quantization,
    multi_lora,
    prefix_caching,
    quantization_tools,
    single_stream,
    speculative_decoding,
    weight_quantization,
)
from labs.lab import Lab

LABS: dict[str, Lab] = {
    module.LAB.name: module.LAB
    for module in (
        continuous_batching,
        prefix_caching,
        speculative_decoding,
        chunked_prefill,
        kv_quantization,
        weight_quantization,
        multi_lora,
        single_stream,
        quantization_tools,
    )
}
"""Every lab, in reading order: whatever enumerates labs reads this."""
