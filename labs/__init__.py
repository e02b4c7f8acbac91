"""What is asked: the labs, and the machinery that runs, judges and reports them."""

from labs import continuous_batching, prefix_caching
from labs.lab import Lab

LABS: dict[str, Lab] = {lab.name: lab for lab in (continuous_batching.LAB, prefix_caching.LAB)}
"""Every lab, in reading order: whatever enumerates labs reads this."""
