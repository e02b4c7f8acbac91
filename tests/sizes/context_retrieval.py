from serving import quantize
from tests.sizes import Sizes, answers_of

SIZES = Sizes(
    fake=f"{answers_of(8, 'far')} {answers_of(24, 'tight')}",
    # weights in 8 bits are served by the lab of weight quantization as well
    cpu='variants=["full","kv-fp8","window"] timeout_s=180',
    gpu="flags.max-model-len=8192 workloads.far.prompt_tokens.tokens=4096"
    " workloads.far.prefix.tokens=4032 workloads.tight.prompt_tokens.tokens=4096",
    needs=quantize.LLM_COMPRESSOR,
)
