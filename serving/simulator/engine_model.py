"""vLLM's own model with random weights, which a stand-in step is made of on a CPU.

The model is built as the engine builds it, from the engine's own arguments, so that vLLM chooses
its layers and kernels: on x86 the 8-bit product of SGLang or of oneDNN, for 4 bits its own that
unpacks as it multiplies. Its parameters are random, and no engine is started. The tokens of a
mixture of experts are sent to experts drawn evenly, since a random router would prefer a few. Plain
torch has no operators for quantized weights and caches, and those that it has take a different
time: docs/notebook/2026-11-30-stand-in.md shows how much.

This module imports vLLM, so it runs in the engine's environment only. Tested with vLLM 0.32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import VllmConfig, get_layers_from_vllm_config, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.utils import (
    initialize_model,
    process_weights_after_loading,
)
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from serving.metrics import EVEN_ROUTING
from serving.plugins import random_weights

SCALE = 1e-3  # of random weights; the norms between layers keep any product finite
CACHE_SCALES = (".q_scale", ".k_scale", ".v_scale", ".prob_scale")
MOST_SEQUENCES = 16  # that a step's tokens are divided into


class EngineModel:
    """The model that an engine with these arguments would serve, with random weights.

    Raises what vLLM raises for arguments that it does not accept.
    """

    def __init__(
        self,
        argv: Sequence[str],
        adapters: int = 0,
        adapter_rank: int = 0,
        adapters_asked_for: bool = True,
    ) -> None:
        """Build the model, with `adapters` slots; join the process group that its layers ask for.

        It is not compiled: a compiled step has no stand-in.
        """
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        arguments = EngineArgs.from_cli_args(parser.parse_args(list(argv)))
        arguments.enforce_eager = True
        self.config: VllmConfig = arguments.create_engine_config()
        self.dtype: torch.dtype = self.config.model_config.dtype
        _join_groups(self.config)
        model_config = self.config.model_config
        if model_config.is_moe:
            random_weights.register_even_routing()
            os.environ[random_weights.ROUTING] = EVEN_ROUTING
        with set_current_vllm_config(self.config), set_default_torch_dtype(self.dtype):
            self.model = initialize_model(self.config)
            for name, parameter in self.model.named_parameters():
                if not name.endswith(CACHE_SCALES):  # as where no checkpoint has them
                    _fill(parameter.data)
            process_weights_after_loading(self.model, model_config, torch.device("cpu"))
        self.attending = get_layers_from_vllm_config(self.config, Attention)
        self.hidden = model_config.get_hidden_size()
        self.slots, self.adapters_asked_for = adapters, adapters_asked_for
        self.adapting: Adapters | None = None
        if adapters:
            vocabulary = model_config.get_vocab_size()
            self.head_adapters = self._thin(adapter_rank, self.hidden, vocabulary)
            for module in self.model.modules():
                if isinstance(module, LinearBase):
                    self._adapt(module, adapter_rank)

    def _thin(self, rank: int, inputs: int, outputs: int) -> tuple[Any, Any]:
        """Make the two matrices of an adapter, for all slots."""
        return (
            torch.zeros(self.slots, 1, rank, inputs, dtype=self.dtype),
            torch.zeros(self.slots, 1, outputs, rank, dtype=self.dtype),
        )

    def _adapt(self, projection: Any, rank: int) -> None:
        """Have the adapters' products added to what a projection, or several in one, returns."""
        widths = getattr(projection, "output_sizes", [projection.output_size])
        matrices = [self._thin(rank, projection.input_size, width) for width in widths]

        def add(module: Any, inputs: tuple[Any, ...], outputs: tuple[Any, Any]) -> None:
            assert self.adapting
            self.adapting.add(inputs[0], matrices, outputs[0])

        projection.register_forward_hook(add)

    def linear(self, tokens: int) -> Callable[[], None]:
        """Return the work of all layers over `tokens`, of up to MOST_SEQUENCES new prompts."""
        prompts = min(tokens, MOST_SEQUENCES)
        lengths = [tokens // prompts + (place < tokens % prompts) for place in range(prompts)]
        block_tokens = self.config.cache_config.block_size
        blocks = -(-lengths[0] // block_tokens)  # of each prompt; the first is the longest
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        first_slots = [blocks * block_tokens * place for place in range(prompts)]
        positions = torch.cat([torch.arange(length) for length in lengths])
        slots = torch.cat(
            [first + torch.arange(n) for first, n in zip(first_slots, lengths, strict=True)]
        )
        described = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            num_reqs=prompts,
            num_actual_tokens=tokens,
            max_query_len=lengths[0],
            max_seq_len=lengths[0],
            block_table_tensor=torch.arange(prompts * blocks, dtype=torch.int32).view(prompts, -1),
            slot_mapping=slots,
        )
        with set_current_vllm_config(self.config):
            metadata = self._metadata(described, prompts * blocks)
        slots_of = dict.fromkeys(self.attending, slots)
        token_ids = torch.randint(self.config.model_config.get_vocab_size(), (tokens,))
        adapting = Adapters(self.slots, tokens, self.adapters_asked_for) if self.slots else None

        def run() -> None:
            self.adapting = adapting
            with set_forward_context(
                metadata, self.config, num_tokens=tokens, slot_mapping=slots_of
            ):
                self.model(token_ids, positions)

        return run

    def _metadata(self, described: CommonAttentionMetadata, blocks: int) -> dict[str, Any]:
        """Return what each layer's attention is told; give each a cache of so many blocks."""
        names, device = [*self.attending], torch.device("cpu")
        metadata = {}
        for name, layer in self.attending.items():
            spec = layer.get_kv_cache_spec(self.config)
            if len(layer.kv_cache) < blocks:
                layer.kv_cache = torch.zeros(
                    blocks, spec.num_kv_heads, spec.block_size, 2 * spec.head_size,
                    dtype=self._cache_dtype,
                )  # fmt: skip
            builder = layer.get_attn_backend().get_builder_cls()(spec, names, self.config, device)
            metadata[name] = builder.build(0, described)
        return metadata

    @property
    def _cache_dtype(self) -> torch.dtype:
        return self.dtype if self.config.cache_config.cache_dtype == "auto" else torch.uint8

    def head(self, rows: int) -> Callable[[], None]:
        """Return the work of the output head and greedy sampling over `rows` positions.

        vLLM's CPU backend adds an adapter's product to the logits of every row, asked for or not.
        """
        x = torch.randn(rows, self.hidden, dtype=self.dtype)
        adapting = Adapters(self.slots, rows, self.adapters_asked_for) if self.slots else None

        def run() -> None:
            logits = self.model.compute_logits(x)
            if adapting:
                adapting.add_to_logits(x, self.head_adapters, logits)
            logits.argmax(dim=-1)

        return run

    def attention(self, tokens: int, context: int) -> Callable[[], None]:
        """Return the work of attention alone, in all layers: `tokens` after a `context`."""
        cache, model_config = self.config.cache_config, self.config.model_config
        heads = model_config.get_num_attention_heads(self.config.parallel_config)
        kv_heads = model_config.get_num_kv_heads(self.config.parallel_config)
        head_dim, layers = model_config.get_head_size(), len(self.attending)
        name, block_tokens, whole = cache.cache_dtype, cache.block_size, context + tokens
        isa = _get_attn_isa(self.dtype, block_tokens, head_dim, name)
        blocks = -(-whole // block_tokens)
        queries = torch.randn(tokens, heads, head_dim, dtype=self.dtype)
        output = torch.empty_like(queries)
        starts = torch.tensor([0, tokens], dtype=torch.int32)
        lengths = torch.tensor([whole], dtype=torch.int32)
        table = torch.arange(blocks, dtype=torch.int32).unsqueeze(0)
        caches = []
        for _ in range(layers):
            both = torch.zeros(
                blocks,
                kv_heads,
                2 * block_tokens,
                head_dim,
                dtype=self._cache_dtype,
            ).chunk(2, dim=2)
            new = torch.randn(2, whole, kv_heads, head_dim, dtype=self.dtype)
            ops.cpu_attn_reshape_and_cache(
                *new, *both, torch.arange(whole), isa, kv_cache_dtype=name
            )
            caches.append(both)
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
            seq_lens=lengths, dtype=self.dtype, query_start_loc=starts, causal=True,
            sliding_window_size=-1, isa=isa, enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=name,
        )  # fmt: skip

        def run() -> None:
            for keys, values in caches:
                ops.cpu_attention_with_kv_cache(
                    query=queries, key_cache=keys, value_cache=values, output=output,
                    query_start_loc=starts, seq_lens=lengths, scale=head_dim**-0.5, causal=True,
                    alibi_slopes=None, sliding_window=-1, block_table=table, softcap=0,
                    scheduler_metadata=metadata, s_aux=None, kv_cache_dtype=name,
                )  # fmt: skip

        return run


class Adapters:
    """Adds the products of LoRA adapters to the outputs of linear operations, in place.

    A call takes the operation's input, the first and second matrices of the adapters, and its
    output. Every token, or row of logits, has the next slot's adapter. Where none is asked for no
    product is computed but that of the logits, and vLLM prepares for all others nevertheless.
    """

    def __init__(self, slots: int, tokens: int, asked_for: bool) -> None:
        numbers = tuple(1 + token % slots if asked_for else 0 for token in range(tokens))
        self._wrapper = PunicaWrapperCPU(tokens, tokens, torch.device("cpu"))
        mapping = LoRAMapping(numbers, numbers, is_prefill=True)  # as vLLM's runner always says
        self._wrapper.update_metadata(mapping, [*range(1, slots + 1)], slots, vocab_size=1)

    def add(self, x: Any, matrices: Sequence[tuple[Any, Any]], y: Any) -> None:
        """Add to the outputs of projections that are computed as one; each has its matrices."""
        first, second = zip(*matrices, strict=True)
        widths = tuple(matrix.shape[2] for matrix in second)
        self._wrapper.add_lora_linear(y, x, first, second, 1.0, widths)

    def add_to_logits(self, x: Any, matrices: tuple[Any, Any], y: Any) -> None:
        self._wrapper.add_lora_logits(y, x, *matrices, 1.0)


def _join_groups(config: VllmConfig) -> None:
    """Join the groups of processes that layers ask for, each of this process alone.

    vLLM makes the one for experts only where the model has some.
    """
    lacks_experts = config.model_config.is_moe and parallel_state._EP is None
    if parallel_state.model_parallel_is_initialized() and not lacks_experts:
        return
    parallel_state.destroy_model_parallel()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(1, 0, local_rank=0, backend="gloo")
        parallel_state.initialize_model_parallel()


def _fill(weights: Any) -> None:
    """Fill a parameter with random numbers of its type; shapes stored as integers stay as is."""
    if weights.is_floating_point():
        weights.uniform_(SCALE / 2, SCALE)
    elif weights.dtype == torch.int8:
        weights.random_(-127, 128)
    elif weights.dtype == torch.int32:
        weights.random_()
