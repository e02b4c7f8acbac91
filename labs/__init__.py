"""What is asked: the labs, and the machinery that runs, judges and reports them."""

from labs import chunked_prefill, continuous_batching, prefix_caching, speculative_decoding
from labs.lab import Lab

LABS: dict[str, Lab] = {
    module.LAB.name: module.LAB
    for module in (continuous_batching, prefix_caching, chunked_prefill, speculative_decoding)
}
"""Every lab, in reading order: whatever enumerates labs reads this."""
