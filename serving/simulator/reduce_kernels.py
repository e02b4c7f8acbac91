"""Reduce published tables of kernel times to those beside this module: `python -m` with a folder.

The folder holds `<card>-vllm-<version>-<operation>_perf.parquet` of NVIDIA's AIConfigurator (its
`systems/data/<card>/**/vllm/<version>/`, Apache-2.0). Reading them takes pyarrow. Kept are the
types, sizes and heads that models in use have; `kernel_times/README.md` describes what is written.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TABLES = Path(__file__).parent / "kernel_times"
CARDS = {"h100_sxm": "h100", "h200_sxm": "h200", "a100_sxm": "a100", "l40s": "l40s"}
TYPES = ("bfloat16", "fp8")
HEAD_DIMS = (64, 128)
Row = Mapping[str, Any]


def main(folder: Path) -> None:
    """Write the tables of every card that the folder has."""
    for path in sorted(folder.glob("*_perf.parquet")):
        theirs, _, version_and_operation = path.stem.removesuffix("_perf").partition("-vllm-")
        _, _, operation = version_and_operation.partition("-")
        if theirs not in CARDS or operation not in KEPT:
            continue
        name, row_names, column, keep = KEPT[operation]
        out = TABLES / CARDS[theirs] / f"{name}.csv"
        _write(out, row_names, column, [row for row in _read(path) if keep(row)])


def _read(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def _write(path: Path, row_names: Sequence[str], column: str, rows: Sequence[Row]) -> None:
    """Write microseconds, one row for each combination of `row_names`, one column for each size."""
    if not rows:
        return
    times_ms: dict[tuple[Any, ...], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        times_ms[tuple(row[name] for name in row_names)][row[column]].append(row["latency"])
    sizes = sorted({size for by_size in times_ms.values() for size in by_size})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*row_names, *sizes])
        for key in sorted(times_ms):
            cells = [_microseconds(times_ms[key].get(size, [])) for size in sizes]
            writer.writerow([*key, *cells])


def _microseconds(times_ms: Sequence[float]) -> str:
    return f"{1000 * statistics.mean(times_ms):.4g}" if times_ms else ""


def _keeps_product(row: Row) -> bool:
    m = row["m"]
    return (
        row["gemm_dtype"] in TYPES
        and (m in (1, 2, 4, 8) or m % 16 == 0)
        and min(row["n"], row["k"]) >= 256
        and row["k"] <= 16384
    )


def _keeps_attention(row: Row) -> bool:
    return not row.get("window_size") and row["head_dim"] in HEAD_DIMS


def _keeps_prompt(row: Row) -> bool:
    return _keeps_attention(row) and row["batch_size"] == 1


def _keeps_exchange(row: Row) -> bool:
    return bool(row["kernel_source"] == "vLLM_custom_graph")


def _keeps_experts(row: Row) -> bool:
    return (
        row["moe_dtype"] in TYPES
        and row["distribution"] == "balanced"
        and row["moe_ep_size"] == 1
        and row["moe_tp_size"] <= 8
    )


HEADS = ("kv_cache_dtype", "num_heads", "num_key_value_heads", "head_dim")
EXPERTS = ("moe_dtype", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size")
KEPT: Mapping[str, tuple[str, Sequence[str], str, Callable[[Row], bool]]] = {
    "gemm": ("products", ("gemm_dtype", "n", "k"), "m", _keeps_product),
    "generation_attention": (
        "decode_attention",
        (*HEADS, "batch_size"),
        "step",
        _keeps_attention,
    ),
    "context_attention": ("prefill_attention", HEADS, "isl", _keeps_prompt),
    "custom_allreduce": ("exchanges", ("num_gpus",), "message_size", _keeps_exchange),
    "moe": ("experts", EXPERTS, "num_tokens", _keeps_experts),
}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
