"""Holds what a run's trials must show, against which the checks hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from pydantic import BaseModel

from labs.harness.spec.lab import Evidence

Found = Iterator[Mapping[str, object]]  # for each fault the figures of its text, by their names
TOKENIZE_S = 3e-6  # per token, with a fast tokenizer on one core
TRANSPORT_S = 0.010  # at most: HTTP and templating, before the engine's clock starts


class Served(BaseModel, frozen=True, extra="forbid"):
    """The weights that a variant's engine must say it loaded.

    `files_sha256` is over the hashes of the files in their folder; `quantized` tells whether their
    configuration names a method of quantization, `random` whether the engine draws them itself and
    has to say how many are zero.
    """

    files_sha256: str
    quantized: bool
    random: bool = False  # so in old runs, too


@dataclass(frozen=True)
class Expected:
    """Holds what a run's trials must show. An old run recorded less, and must show less."""

    evidence: Sequence[Evidence] = ()
    endpoint: bool = False  # it was neither started nor configured by the lab
    metrics_read: bool = True  # False: from the start, the endpoint showed no metrics
    on_gpus: bool = False  # of this machine, and a GPU whose state cannot be read is to be named
    gpu_part: bool = False  # these are parts of a GPU (MIG, vGPU), which often do not show it
    model: str = ""  # the name under which the base model answers; empty where it is not known
    template_tokens: int | None = None  # the most that the chat template puts before every text
    served: Mapping[str, Served] = field(default_factory=dict)  # by variant
    acceptance: Mapping[str, float] = field(default_factory=dict)  # by point: of a drafted token
    least_copied: Mapping[str, float] = field(default_factory=dict)  # by point: share accepted
    # by variant, of those measured at one stream: what transport adds to the engine's TTFT
    transport_s: Mapping[str, float] = field(default_factory=dict)
    least_hit_rate: Mapping[str, float] = field(default_factory=dict)  # by point, as was forecast
    least_found: Mapping[str, Sequence[int]] = field(default_factory=dict)  # after each request

    def with_transport(self, found_s: Mapping[str, Mapping[tuple[str, int], float]]) -> Expected:
        """Expect what transport usually took in these trials of each variant, at one stream."""
        usual_s = {
            variant: usual_transport_s([*of.values()]) for variant, of in found_s.items() if of
        }
        return replace(self, transport_s=usual_s)


def usual_transport_s(found_s: Sequence[float]) -> float:
    """Take the median of what was found at one stream, from 0 to TRANSPORT_S.

    A client that is always late is late at one stream, too.
    """
    return min(TRANSPORT_S, max(0.0, median(found_s)))
