"""Leave out of a lean bundle what one kind of GPU does not need: `make bundle LEAN=hopper`.

It carries what serves random weights on a Hopper GPU (H100, H200) with vLLM 0.26, and no more. What
is left out was read in vLLM 0.26.0's source, where each is imported only by what is named here.
"""

from __future__ import annotations

import csv
import io
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from serving import whole
from serving.weights.models import BUNDLED, CACHE, TOKENIZER, TOKENIZER_ALONE, bundled


@dataclass(frozen=True)
class Lean:
    """Lists what a bundle for one kind of GPU leaves out, and what it then cannot do."""

    packages: tuple[str, ...]  # with all that only they need
    files: dict[str, str]  # package -> a pattern of the paths in its wheel that stay behind
    cannot: str


LEAN = {
    "hopper": Lean(
        packages=(
            # kernels of other models, and those that vLLM only uses when they are there
            "flashinfer-python", "nvidia-cutlass-dsl", "quack-kernels", "tilelang",
            "tokenspeed-mla", "humming-kernels", "nvidia-cudnn-frontend", "cuda-tile",
            # pictures and video; loading weights, of which there are none; traces
            "opencv-python-headless", "pynvvideocodec", "fastsafetensors",
            "opentelemetry-exporter-otlp", "opentelemetry-sdk", "mistral-common",
            # n-grams alone are looked up with it
            "numba",
        ),
        files={
            "vllm": r"vllm/vllm_flash_attn/_vllm_fa2_C\.|vllm/vllm-rs$|vllm/_flashmla|"
            r"vllm/_qutlass|vllm/third_party/(?:deep_gemm|fmha_sm100)/|"
            r"vllm/entrypoints/serve/instrumentator/static/|.*\.(?:jpg|png)$",
        },
        cannot="It serves random weights only (WEIGHTS=dummy), on Hopper alone: FlashAttention 2,"
        " which older and newer GPUs use, the Rust front end, FlashInfer, DeepGEMM, MLA kernels,"
        " Prometheus (`make import` fills dashboards at home), pictures and the bundled model are"
        " not in it. Speculation by n-grams needs a numba that"
        " is there already.",
    )
}  # fmt: skip


def lean_wheel(wheel: Path, pattern: str) -> Path:
    """Write a wheel again without the files that match; return it. Nothing is done twice."""
    folder = wheel.parent / "lean"
    target = folder / wheel.name
    if target.exists():
        return target
    stays = re.compile(pattern)
    with whole.file(target) as half, zipfile.ZipFile(wheel) as source, \
            zipfile.ZipFile(half, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as lean:  # fmt: skip
        for member in source.infolist():
            if stays.match(member.filename):
                continue
            content = source.read(member)
            if member.filename.endswith(".dist-info/RECORD"):
                content = _record(content.decode(), stays).encode()
            lean.writestr(member, content, zipfile.ZIP_DEFLATED, compresslevel=9)
    return target


def _record(text: str, stays: re.Pattern[str]) -> str:
    """Leave the files that stay behind out of a wheel's list of its files."""
    kept = io.StringIO()
    rows = (row for row in csv.reader(io.StringIO(text)) if row and not stays.match(row[0]))
    csv.writer(kept, lineterminator="\n").writerows(rows)
    return kept.getvalue()


def tokenizer_files() -> dict[str, Path]:
    """Return where the bundled tokenizer's files go in the lab -> where they are here."""
    folder, home = bundled(), Path(CACHE.name)
    return {str(home / TOKENIZER_ALONE / name): folder / name for name in TOKENIZER}


def why(name: str) -> str:
    """Say what a lean bundle cannot do."""
    return f"{LEAN[name].cannot} The model whose tokenizer it has is {BUNDLED}."
