"""Random weights in a real architecture: speed, memory and scheduling are real, the text is not.

vLLM's `--load-format dummy` fills a model with small random numbers as it starts, so an
architecture needs its config and a tokenizer and nothing to download. The configs ship with the
lab; the tokenizer and the chat template are the bundled model's, whose 49,152 tokens lie within
each vocabulary here. Prompts are therefore text of an exact length; answers hold ids beyond
the tokenizer, which decode to nothing, and end at the length asked for (`ignore_eos`).

What a lab derives from the served model is made in the same way: a draft is the same architecture
with fewer layers, other KV heads, fewer bits a weight and a dense model in the place of a mixture
of experts are a config that says so, adapters are random matrices of the real shape. What depends
on text, such as a study of activations, is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serving import atomic
from serving.hardware import gpus
from serving.hardware.machine import Machine
from serving.models import catalog
from serving.models.adapters import CONFIG, RANK, TARGETS, TENANTS, WEIGHTS, WIDE_RANK
from serving.models.catalog import RANDOM, RECORD, TOKENIZER, Model, ModelError, Shape
from serving.models.kv_heads import kv_heads_of

SHAPES: dict[str, str] = {
    # serving/models/shapes/<name>.json -> the public architecture whose numbers it has
    "llama-8b": "Llama 3.1 8B: dense, 8 KV heads for 32",
    "llama-70b": "Llama 3.1 70B: dense, 8 KV heads for 64",
    "qwen3-14b": "Qwen3 14B: dense, 8 KV heads for 40",
    "llama-1b": "Llama 3.2 1B: dense, tied embeddings",
    "moe-30b": "Qwen3 30B-A3B: a mixture of 128 experts, 8 for each token",
    "moe-3b": "nobody's: a mixture of 40 experts, 8 for each token, sized for a GPU of 16 GB",
    "moe-tiny": "nobody's: a mixture of 32 experts, 4 for each token, sized for a CPU",
    "llama-tiny": "nobody's: sized for a CPU, with a vocabulary beyond the tokenizer's",
}
HOME = Path(__file__).parent / "shapes"
SUFFIX = "-dummy"  # so that the model's name shows it
NOTE = "vLLM fills this model with random weights as it starts: --load-format dummy\n"


DRAFT_LAYERS = 8  # the draft has a layer for each so many of the target's


def resolve(machine: Machine, name: str = "") -> Model:
    """Find a shape that ships with the lab, or the machine's default one.

    `name` may also be a `config.json`, or the folder of one. Raises ModelError.
    """
    if not name:
        name = "llama-tiny" if machine.kind == "cpu" else gpus.class_of(machine.memory_bytes).dummy
    if name not in SHAPES and (path := _config_file(name)):
        return _of_config(path)
    if name not in SHAPES:
        shapes = "; ".join(f"{shape} ({text})" for shape, text in SHAPES.items())
        raise ModelError(
            f"no shape {name!r} ships with the lab for WEIGHTS=dummy; known: {shapes};"
            " any other architecture is given as the path of its config.json"
        )
    return catalog.load(_folder(f"{name}{SUFFIX}", config_of(name)), f"{name}{SUFFIX}")


def _config_file(name: str) -> Path | None:
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    return path.resolve() if path.is_file() else None


def _of_config(path: Path) -> Model:
    """Make a model of a config alone, named for its file or folder. Raises ModelError."""
    try:
        content = path.read_bytes()
        config = json.loads(content)
        named = path.parent.name if path.name == "config.json" else path.stem
        name = f"{named}{SUFFIX}"
        digest = hashlib.sha256(content).hexdigest()[:8]  # two may have one name
        return catalog.load(_folder(f"{name}-{digest}", config), name)
    except (OSError, ValueError, ModelError) as error:
        raise ModelError(f"MODEL={path} cannot be read as a config.json: {error}") from error


def config_of(name: str) -> dict[str, Any]:
    """Read the config of a shape that ships with the lab."""
    config: dict[str, Any] = json.loads((HOME / f"{name}.json").read_text())
    return config


def derive(model: Model, name: str) -> Path:
    """Make what a lab derives from a model with random weights; return its folder.

    Raises ModelError for what needs real weights.
    """
    if name not in DERIVED:
        raise ModelError(
            f"{name} needs real weights, and {model.name} has random ones: leave WEIGHTS=dummy"
            f" out (available with random weights: {', '.join(DERIVED)})"
        )
    config = json.loads((model.path / "config.json").read_text())
    config = config.get("text_config", config)
    folder = f"{model.name}-{name}"
    return (
        _adapters(folder, config) if name == "adapters" else _folder(folder, changed(config, name))
    )


def changed(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the config of what is derived by this name. Raises ModelError where that cannot be."""
    if name == "draft":
        layers = max(1, config["num_hidden_layers"] // DRAFT_LAYERS)
        return {**config, "num_hidden_layers": layers}
    if name in KV_HEADS:
        return {**config, "num_key_value_heads": kv_heads_of(name, config)}
    if name in DENSE:
        return dense(config, name)
    if catalog.shape_of(config).experts:
        raise ModelError(f"{name}: quantized experts with random weights are not supported")
    return quantized(config, name)


def _folder(name: str, config: dict[str, Any]) -> Path:
    """Write a model folder without weights: config, tokenizer, and a file that marks it so."""
    folder = catalog.CACHE / "dummy" / name
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(ModelError):  # where there is none: a plan needs the config alone
        source = catalog.bundled_tokenizer()
        for part in TOKENIZER:
            if not (folder / part).exists():
                atomic.write(folder / part, (source / part).read_bytes())
    atomic.write(folder / "config.json", json.dumps(config, indent=1))
    atomic.write(folder / RANDOM, NOTE)
    return folder


def dense(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Describe the dense model that stands beside a mixture of experts of Qwen3's architecture.

    `name` is one of `DENSE`. Layers, attention, embeddings and head are the mixture's; its one MLP
    is as wide as the experts that it stands for. The router is left out: of each layer it is a
    matrix of hidden size x experts. Raises ModelError where the config is of another architecture.
    """
    if config.get("model_type") != "qwen3_moe":
        raise ModelError(f"{name} stands beside a mixture of experts of Qwen3's architecture alone")
    of_experts = (
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "decoder_sparse_step",
        "mlp_only_layers",
        "norm_topk_prob",
    )
    return {
        **{field: value for field, value in config.items() if field not in of_experts},
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "intermediate_size": config[DENSE[name]] * config["moe_intermediate_size"],
    }


def quantized(config: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """Describe the same architecture with quantized linear layers, as llm-compressor would.

    `precision` is a name of `QUANTIZATIONS`.
    """
    weights, inputs, form = QUANTIZATIONS[precision]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    quantization = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    return {**config, "quantization_config": quantization}


def _numbers(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    fixed = {"symmetric": True, "dynamic": False, **more}
    return {"num_bits": bits, "type": kind, "strategy": strategy, **fixed}


def _adapters(name: str, config: dict[str, Any]) -> Path:
    """Write an adapter for each tenant, in PEFT's format; those of a rank share one file."""
    folder = catalog.CACHE / "dummy" / name
    if folder.exists():
        return folder
    with atomic.folder(folder) as half:
        for rank in (RANK, WIDE_RANK):
            suffix = "" if rank == RANK else f"-rank-{rank}"
            for tenant in range(TENANTS):
                _adapter(
                    half / f"tenant-{tenant}{suffix}",
                    catalog.shape_of(config),
                    rank,
                    None if tenant == 0 else half / f"tenant-0{suffix}",
                )
        params = adapter_params(catalog.shape_of(config), RANK)
        about = {"rank": RANK, "params_per_adapter": params, "weights": "random"}
        (half / RECORD).write_text(json.dumps(about))
    return folder


def _adapter(folder: Path, shape: Shape, rank: int, like: Path | None) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "bias": "none",
        "target_modules": list(TARGETS),
        "task_type": "CAUSAL_LM",
    }
    (folder / CONFIG).write_text(json.dumps(fields, indent=2))
    weights = folder / WEIGHTS
    if like:
        _share(like / weights.name, weights)
        return
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(shape.layers):
        for target, (inputs, outputs) in _targets(shape).items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            for part, size in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
                drawn = rng.standard_normal(size, dtype=np.float32) * 1e-3
                tensors[f"{at}.{part}.weight"] = drawn.astype(np.float16)
    save_file(tensors, weights, metadata={"format": "pt"})


def _share(file: Path, name: Path) -> None:
    """Give a file another name; a copy where the file system has no hard links."""
    try:
        name.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, name)


def adapter_params(shape: Shape, rank: int) -> int:
    """Count an adapter's parameters: rank x (inputs + outputs) of every adapted matrix."""
    return shape.layers * sum(rank * (i + o) for i, o in _targets(shape).values())


def _targets(shape: Shape) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of each matrix that adapters apply to."""
    queries, keys = (n * shape.head_dim for n in (shape.heads, shape.kv_heads))
    sizes = (
        (shape.hidden, queries),
        (shape.hidden, keys),
        (shape.hidden, keys),
        (queries, shape.hidden),
    )
    return dict(zip(TARGETS, sizes, strict=True))


QUANTIZATIONS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    # name -> how weights and inputs are quantized, and the format on disk
    "w8a8": (
        _numbers(8, "int", "channel"),
        _numbers(8, "int", "token", dynamic=True),
        "int-quantized",
    ),
    "fp8": (
        _numbers(8, "float", "channel"),
        _numbers(8, "float", "token", dynamic=True),
        "float-quantized",
    ),
    "w4a16-gptq": (_numbers(4, "int", "group", group_size=128), None, "pack-quantized"),
}
DENSE = {"dense-total": "num_experts", "dense-active": "num_experts_per_tok"}
"""Dense model beside a mixture of experts -> the field with the number of experts it stands for."""
KV_HEADS = ("mha", "mqa")
DERIVED = ("draft", "adapters", *KV_HEADS, *DENSE, *QUANTIZATIONS)
