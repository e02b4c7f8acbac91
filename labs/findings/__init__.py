"""What a lab concludes beyond its claims: tables and sentences, computed from a run's files alone.

A lab names its findings (`Lab.findings`); each function here is pure and returns a `Finding`.
"""

from collections.abc import Callable

from labs.filing.results import Finding
from labs.findings import chunks, quantization, speculation, streams, tenants
from labs.findings.context import Context

FINDINGS: dict[str, Callable[[Context], Finding]] = {
    "token-budget": chunks.token_budget,
    "acceptance": speculation.acceptance,
    "speed-up": speculation.speed_up,
    "same-text": speculation.same_text,
    "preemption": quantization.preemption,
    "context-slope": quantization.context_slope,
    "quality": quantization.quality,
    "needles": quantization.needles,
    "memory-ladder": quantization.memory_ladder,
    "weights": quantization.weights_table,
    "outliers": quantization.outliers,
    "tools": quantization.tools,
    "tenant-leaks": tenants.tenant_leaks,
    "adapter-cost": tenants.adapter_cost,
    "tenant-memory": tenants.tenant_memory,
    "timing-leak": tenants.timing_leak,
    "phases": streams.phases,
    "flags": streams.flags,
}
