"""How large and how fast quantized weights are."""

from __future__ import annotations

from dataclasses import dataclass

from labs.harness.analysis.quantity import RATIO, Quantity
from labs.harness.derived.run_view import Context


@dataclass(frozen=True)
class Making:
    """How a variant's weights were quantized."""

    tool: str
    tool_version: str
    took_s: Quantity
    calibration: str


@dataclass(frozen=True)
class Weights:
    """A variant's bytes of weights, and what was measured with them."""

    variant: str
    in_memory_bytes: float
    bytes_ratio: float  # to those of the run's first point
    tpot_s: Quantity  # at one stream
    speed_up: Quantity  # TPOT of the run's first point / this one's
    tokens_per_s: Quantity  # at the largest load
    prefill_tokens_per_s: Quantity
    making: Making | None

    @property
    def in_memory(self) -> Quantity:
        return Quantity(self.in_memory_bytes / 1e6, "MB")

    @property
    def by_bytes(self) -> Quantity:
        """What decode would gain at one stream if it only read weights."""
        return Quantity(1 / self.bytes_ratio, RATIO)


@dataclass(frozen=True)
class KindsOfWeights:
    """Every variant's weights, beside those of the run's first point."""

    kinds: tuple[Weights, ...]
    most_users: int
    prefill_tokens: float | None  # None where the lab prefills nothing on its own

    def __getitem__(self, variant: str) -> Weights:
        return next(kind for kind in self.kinds if kind.variant == variant)

    @property
    def has_loads(self) -> bool:
        """Whether decode had more than one stream."""
        return self.most_users > 1


def kinds_of_weights(run: Context) -> KindsOfWeights:
    plain = run.points[0]
    prefill = next((p for p in run.points if p.workload.name == "prefill"), None)
    prompt_tokens = Quantity(
        prefill.prompt_tokens if prefill else None, "tok/s", why="no prompt was sent alone"
    )
    most = max((p.load.users for p in run.points if p.workload.name == "decode"), default=1)
    in_memory_bytes = {p.variant.name: p.shape.weight_bytes for p in run.points}
    base = run.point(plain.variant.name, "decode", "concurrent:1")
    kinds = []
    for variant in run.lab.variants:
        if variant.name not in in_memory_bytes:
            continue
        alone = run.point(variant.name, "decode", "concurrent:1")
        loaded = run.point(variant.name, "decode", f"concurrent:{most}")
        prefill_s = run.quantity(run.point(variant.name, "prefill", "concurrent:1"), "ttft_mean_s")
        kinds.append(
            Weights(
                variant.name,
                in_memory_bytes[variant.name],
                bytes_ratio=in_memory_bytes[variant.name] / plain.shape.weight_bytes,
                tpot_s=run.quantity(alone, "tpot_mean_s"),
                speed_up=run.measured_ratio(base, alone, "tpot_mean_s"),
                tokens_per_s=run.quantity(loaded, "output_tokens_per_s"),
                prefill_tokens_per_s=prompt_tokens / prefill_s.in_unit("1"),
                making=_making(run, variant.weights),
            )
        )
    return KindsOfWeights(tuple(kinds), most, prompt_tokens.value)


def _making(run: Context, weights: str) -> Making | None:
    about = run.run.about.get(weights, {})
    if "tool" not in about:
        return None
    took_s = Quantity(about["seconds"], "s")
    return Making(about["tool"], about["tool_version"], took_s, about.get("calibration") or "")
