"""Compare copying keys and values back from the host's memory with computing them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from labs.harness import theory
from labs.harness.judging.text import number
from labs.harness.spec import Point


@dataclass(frozen=True)
class CopyOrCompute:
    """Says from which length of a prefix on copying its keys and values is the faster way.

    It is arithmetic on the machine's ceilings: each way at its full rate.
    """

    bytes_per_token: float
    flops_per_s: float  # of prefill, the measured ceiling
    link_bytes_per_s: float  # of all links together
    links: int  # of as many GPUs
    link_is_measured: bool
    pays_from_tokens: float  # 0: at any length
    pays_from_bytes_per_s: float  # the rate of a link above which it pays at any length

    @classmethod
    def of(cls, point: Point) -> Self:
        """Computes it for a point's model, cache and machine."""
        shape, ceilings = point.shape, point.ceilings
        flops_per_s, link = ceilings.flops_per_s, ceilings.link_bytes_per_s
        value_bytes = point.flags.kv_value_bytes
        return cls(
            bytes_per_token=shape.kv_bytes_per_token(value_bytes),
            flops_per_s=flops_per_s,
            link_bytes_per_s=link,
            links=ceilings.devices,
            link_is_measured=ceilings.host_bytes_per_s is not None,
            pays_from_tokens=theory.copying_pays_from_tokens(shape, flops_per_s, link, value_bytes),
            pays_from_bytes_per_s=theory.link_that_pays_bytes_per_s(
                shape, flops_per_s, value_bytes
            ),
        )


BREAK_EVEN_LENGTH = (
    "That length is (k F / r - 2 P) / (2 L d) tokens, with k bytes a token, F FLOP/s, r bytes/s, P"
    " parameters, and L layers of width d."
)


def break_even_sentence(facts: CopyOrCompute) -> str:
    """Says which way is the faster, and from where on, by arithmetic."""
    rate = number(facts.link_bytes_per_s / 1e9, "GB/s")
    link = (
        f"the links of {facts.links} GPUs, {rate} together"
        if facts.links > 1
        else (f"a GPU's link of {rate}")
    )
    known = "measured" if facts.link_is_measured else "PCIe 4.0 x16 by its specification"
    when = (
        f"from {facts.pays_from_tokens:,.0f} tokens of prefix on"
        if facts.pays_from_tokens >= 1
        else "at any length of the prefix"
    )
    return (
        "Where evicted keys and values are kept in the host's memory (arithmetic), copying"
        f" {facts.bytes_per_token:,.0f} bytes a token back over {link} ({known}) takes"
        f" less time than prefilling at {number(facts.flops_per_s / 1e12, 'TFLOP/s')} {when}. A"
        f" link of more than {number(facts.pays_from_bytes_per_s / 1e9, 'GB/s')} is the faster way"
        " at any length, a slower one only from some length on."
    )
