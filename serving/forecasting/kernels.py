"""vLLM's own operators on a CPU, which a stand-in step is made of there.

Plain torch has none for quantized weights and caches, and those that it has for BF16 take a
different time: docs/forecasts.md shows how much.

A linear layer is built as vLLM builds it, from the configuration that the engine's own arguments
give, so that vLLM chooses the kernel: on x86 the 8-bit product of SGLang or of oneDNN, for 4 bits
its own that unpacks as it multiplies. Attention reads a paged cache by the CPU backend's operator.
Weights are random, and no engine is started.

This module imports vLLM, so it runs in the engine's environment only. Tested with vLLM 0.32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

SCALE = 1e-3  # of random quantized weights; the norms between layers keep any product finite


class Kernels:
    """The operators that an engine with these arguments would use.

    Raises what vLLM raises for arguments that it does not accept.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        """Resolve the engine's configuration; join the process group that vLLM's layers ask for."""
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        arguments = EngineArgs.from_cli_args(parser.parse_args(list(argv)))
        self.config: VllmConfig = arguments.create_engine_config()
        self.dtype: torch.dtype = self.config.model_config.dtype
        if not parallel_state.model_parallel_is_initialized():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            with TemporaryDirectory() as folder, set_current_vllm_config(self.config):
                parallel_state.init_distributed_environment(
                    1, 0, f"file://{folder}/store", 0, "gloo"
                )
                parallel_state.initialize_model_parallel()

    def linear(self, inputs: int, outputs: int, layer: int) -> Callable[[Any], Any]:
        """Return x -> y of a layer's linear operation, with random weights in its own format."""
        with set_current_vllm_config(self.config):
            module = ReplicatedLinear(
                inputs,
                outputs,
                bias=False,
                params_dtype=self.dtype,
                quant_config=self.config.quant_config,
                prefix=f"model.layers.{layer}.mlp.down_proj",  # of a kind that is always quantized
                disable_tp=True,
            )
            for parameter in module.parameters():
                _fill(parameter.data)
            module.quant_method.process_weights_after_loading(module)
        return lambda x: module.quant_method.apply(module, x)

    def attention(
        self, heads: int, kv_heads: int, head_dim: int, layers: int, tokens: int, context: int
    ) -> Callable[[], None]:
        """Return the work of attention in all layers: `tokens` after a `context` in the cache."""
        cache = self.config.cache_config
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
                dtype=self.dtype if name == "auto" else torch.uint8,
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


def _fill(weights: Any) -> None:
    """Fill a parameter with random numbers of its type; shapes stored as integers stay as is."""
    if weights.is_floating_point():
        weights.uniform_(SCALE / 2, SCALE)
    elif weights.dtype == torch.int8:
        weights.random_(-127, 128)
    elif weights.dtype == torch.int32:
        weights.random_()
