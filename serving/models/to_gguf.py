"""The same model as one GGUF file, for llama.cpp.

GGUF is llama.cpp's file format: weights, sizes, tokenizer and chat template in one file. The
weights stay in BF16, and vectors are stored in 32 bits, which llama.cpp's own converter does, too.
By the method `q4` the layers' matrices are in Q4_0: 4 bits, and a scale of 16 bits for each 32
weights, rounded to nearest without calibration. Embeddings and the output head stay in BF16, where
the makers of GPTQ and AWQ leave them, too. `gguf` writes no type of 256 weights a block, such as
Q4_K, which the bundled model's width of 576 would not admit either. Q4_1 is the grid that the
bundled model's file was on: it would find those levels again, and seem to lose nothing. What Q4_0
loses is scored here on the rounded weights, since llama.cpp's server gives no logprobs of a prompt;
its kernels also round the activations, to 8 bits.

Its kernels expect the rows of Llama's query and key projections in another order, since they rotate
neighbours where the checkpoint rotates halves; Qwen2's stay as they are.

Dense models of the kinds in `ARCHITECTURES` can be converted, with a byte-level BPE tokenizer of a
kind in `PRE_TOKENIZERS`, and without scaled rotary positions. For others there is llama.cpp's
`convert_hf_to_gguf.py`. Source: the GGUF specification in the repository of ggml; `gguf` on PyPI.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serving.models import catalog, making, sparsity
from serving.models.making import MakerError

FILE = "model.gguf"
BF16, Q4 = "bf16", "q4"  # the methods
ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
PRE_TOKENIZERS = {  # how text is cut before merging: a part of the pattern -> llama.cpp's name
    r"\p{N}{1,3}": "llama-bpe",
    r"|\p{N}|": "qwen2",
}
PLAIN = "gpt-2"  # the pattern of GPT-2, which byte-level tokenizers have by themselves
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # kinds of token


def pre_tokenizer_of(tokenizer: Mapping[str, Any]) -> str:
    """Name the way of cutting text by a tokenizer.json. Raises MakerError for an unknown one."""
    cutter = tokenizer.get("pre_tokenizer") or {}
    if cutter.get("type") == "ByteLevel" and cutter.get("use_regex", True):
        return PLAIN
    patterns = [
        str((part.get("pattern") or {}).get("Regex", ""))
        for part in cutter.get("pretokenizers") or ()
        if part.get("type") == "Split"
    ]
    for pattern in patterns:
        for part, name in PRE_TOKENIZERS.items():
            if part in pattern:
                return name
    raise MakerError(
        "its tokenizer cuts text in a way that is not known here: convert the model with"
        " llama.cpp's convert_hf_to_gguf.py"
    )


def permuted(tensor: Any, heads: int) -> Any:
    """Reorder a projection's rows so that the two halves of each head's rotation interleave."""
    rows = tensor.shape[0]
    halves = tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def require_known(base: Path) -> None:
    """Check that a model is of a kind that can be converted. Raises MakerError."""
    config = making.read_config(base)
    name = next(iter(config.get("architectures") or ["an unknown kind"]))
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise MakerError(f"{base.name} is {name}, and only {known} can be converted here")
    making.require_16_bits(base, config)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise MakerError(f"{base.name} has scaled rotary positions, which are not converted here")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    if tokenizer["model"]["type"] != "BPE":
        raise MakerError(f"{base.name} has a tokenizer that is no BPE, which is not converted here")
    pre_tokenizer_of(tokenizer)


def make(base: Path, out: Path, method: str = BF16, source: Path | None = None) -> dict[str, Any]:
    """Write the file; score its weights, and those before, on the passages of `source`.

    Raises MakerError where that is not possible.
    """
    require_known(base)  # before imports that take seconds
    import gguf
    from safetensors import safe_open

    config = making.read_config(base)
    architecture = ARCHITECTURES[config["architectures"][0]]
    rope = config.get("rope_parameters") or {}
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    permuted_heads = {"q_proj": heads, "k_proj": kv_heads} if architecture == "llama" else {}
    layers = int(config["num_hidden_layers"])
    names = gguf.get_tensor_name_map(
        {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}[architecture], layers
    )
    writer = gguf.GGUFWriter(out / FILE, architecture)
    writer.add_name(base.name)
    types, files = gguf.GGMLQuantizationType, gguf.LlamaFileType
    writer.add_file_type(files.MOSTLY_Q4_0 if method == Q4 else files.MOSTLY_BF16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(layers)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta", 1e4)))
    writer.add_rope_dimension_count(int(config.get("head_dim") or config["hidden_size"] // heads))
    writer.add_vocab_size(int(config["vocab_size"]))
    _add_tokenizer(writer, base, int(config["vocab_size"]))
    scored = _Scored(base, source) if source else None
    sizes: dict[str, int] = {}
    for shard in catalog.shards(base):
        with safe_open(shard, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(key)
                place = names.get_name(key, try_suffixes=(".weight", ".bias"))
                if place is None:
                    raise MakerError(f"{base.name} has a tensor {key}, which {architecture} lacks")
                of_layer = types.Q4_0 if method == Q4 and place.startswith("blk.") else types.BF16
                kind = types.F32 if tensor.ndim == 1 else of_layer
                data = gguf.quants.quantize(tensor.float().numpy(), kind)
                if scored and kind == types.Q4_0:
                    scored.replace(key, gguf.quants.dequantize(data, kind))
                for part, count in permuted_heads.items():
                    if f".{part}." in key:
                        data = permuted(data, count)  # scales are of parts of a row
                writer.add_tensor(place, data, raw_dtype=kind)
                sizes[place] = data.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    looked_up = sizes["token_embd.weight"] if "output.weight" in sizes else 0
    return {
        "format": "GGUF",
        "dtype": "q4_0" if method == Q4 else "bfloat16",
        "weight_bytes": sum(sizes.values()) - looked_up,
        **(scored.facts() if scored else {}),
    }


class _Scored:
    """The model as it is scored on passages: before, and with the weights of the file."""

    def __init__(self, base: Path, source: Path) -> None:
        tokenizer, self._model = making.load(base)
        self._passages = [
            making.tokens_in(tokenizer, passage) for passage in making.read_passages(source)
        ]
        self._before = sparsity.losses(self._model, self._passages)

    def replace(self, key: str, weights: Any) -> None:
        import torch

        self._model.get_parameter(key).data.copy_(torch.from_numpy(weights))

    def facts(self) -> dict[str, Any]:
        after = sparsity.losses(self._model, self._passages)
        return {
            "passages_tokens": [len(passage) - 1 for passage in self._passages],
            "loss_nats": {BF16: self._before, Q4: after},
        }


def _add_tokenizer(writer: Any, base: Path, size: int) -> None:
    """Add tokens, merges, special tokens and the chat template."""
    import transformers

    tokenizer = json.loads((base / "tokenizer.json").read_text())
    bpe, added = tokenizer["model"], tokenizer["added_tokens"]
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [USER_DEFINED] * size
    for token, index in bpe["vocab"].items():
        tokens[index], kinds[index] = token, NORMAL
    for token in added:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_of(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    )
    loaded = transformers.AutoTokenizer.from_pretrained(base)
    for add, index in (
        (writer.add_bos_token_id, loaded.bos_token_id),
        (writer.add_eos_token_id, loaded.eos_token_id),
        (writer.add_pad_token_id, loaded.pad_token_id),
    ):
        if index is not None:
            add(index)
    writer.add_add_bos_token(False)  # the chat template writes it where the model wants it
    if loaded.chat_template:
        writer.add_chat_template(loaded.chat_template)
