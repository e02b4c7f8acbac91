"""Compare copying keys and values back from the host's memory with computing them again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Self

from labs.harness.analysis.quantity import Quantity
from labs.harness.spec import theory
from labs.harness.spec.lab import Point
from serving.hardware.gpus import DATASHEETS
from serving.models import catalog, dummy
from serving.simulator import cards
from serving.simulator.step import Piece, Step

EXAMPLE_CARD, EXAMPLE_MODEL = "NVIDIA H100 80GB HBM3", "llama-8b"
EXAMPLE_TOKENS = 16_384  # the longest prompt whose attention was timed there: none is extrapolated


@dataclass(frozen=True)
class OnOneCard:
    """Both ways on one GPU that is not here: its link's datasheet, its prefill by its kernels."""

    card: str
    model: str
    tokens: int
    link: Quantity
    copy_s: Quantity
    prefill_s: Quantity  # with the band of a faster and a slower engine
    even: Quantity  # the rate of a link that takes as long as the prefill


@cache
def on_one_card() -> OnOneCard:
    """Compare both ways for the example."""
    config, sheet = dummy.config_of(EXAMPLE_MODEL), DATASHEETS[EXAMPLE_CARD]
    shape, link = catalog.shape_of(config), sheet.host_bytes_per_s
    assert link, "the example's link has a datasheet"
    prompt = Step([Piece(EXAMPLE_TOKENS, 0)], 1)
    prefill_s, *ends_s = (times.seconds(prompt) for times in cards.steps(config, shape, sheet))
    all_bytes = EXAMPLE_TOKENS * shape.kv_bytes_per_token()
    return OnOneCard(
        card=EXAMPLE_CARD.removeprefix("NVIDIA ").split()[0],
        model=dummy.SHAPES[EXAMPLE_MODEL].partition(":")[0],
        tokens=EXAMPLE_TOKENS,
        link=Quantity(link / 1e9, "GB/s"),
        copy_s=Quantity(theory.kv_copy_s(shape, EXAMPLE_TOKENS, link), "s"),
        prefill_s=Quantity(prefill_s, "s", min(ends_s), max(ends_s)),
        even=Quantity(all_bytes / prefill_s / 1e9, "GB/s"),
    )


@dataclass(frozen=True)
class CopyOrCompute:
    """Says from which length of a prefix on copying its keys and values is the faster way.

    It is arithmetic on the machine's ceilings: each way at its full rate. Where no link was
    measured, that of PCIe 4.0 beside this machine's prefill would compare two machines: then
    `example` has both figures of one.
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
    def example(self) -> OnOneCard:
        return on_one_card()

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
