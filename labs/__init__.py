"""What is asked: the labs, and the machinery that runs, judges and reports them."""

import importlib

from labs.lab import Lab


def _lab(module: str) -> Lab:
    """Import the `LAB` that `labs/<module>.py` defines."""
    lab = importlib.import_module(f"labs.{module}").LAB
    if not isinstance(lab, Lab):
        raise TypeError(f"labs.{module}.LAB is no Lab")
    return lab


LABS: dict[str, Lab] = {
    lab.name: lab
    for lab in (
        _lab("continuous_batching"),
        _lab("prefix_caching"),
        _lab("speculative_decoding"),
        _lab("chunked_prefill"),
        _lab("kv_quantization"),
        _lab("weight_quantization"),
        _lab("multi_lora"),
        _lab("single_stream"),
        _lab("quantization_tools"),
    )
}
"""Every lab, in reading order: whatever enumerates labs reads this."""
