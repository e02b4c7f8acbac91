"""Compare copying keys and values back from the host's memory with computing them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from labs.harness import theory
from labs.harness.judging.quantity import Quantity
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

    @property
    def link(self) -> Quantity:
        return Quantity(self.link_bytes_per_s / 1e9, "GB/s")

    @property
    def prefill(self) -> Quantity:
        return Quantity(self.flops_per_s / 1e12, "TFLOP/s")

    @property
    def pays_from_link(self) -> Quantity:
        return Quantity(self.pays_from_bytes_per_s / 1e9, "GB/s")

    @property
    def has_several_links(self) -> bool:
        return self.links > 1

    @property
    def pays_at_any_length(self) -> bool:
        return self.pays_from_tokens < 1
