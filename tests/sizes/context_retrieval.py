from serving.models import quantize
from tests.sizes import Sizes, answers_of

SIZES = Sizes(
    fake=f"{answers_of(8, 'far')} {answers_of(24, 'tight')}",
    # weights in 8 bits and a cache in FP8 are served by the labs about these as well
    cpu='variants=["full","window"] timeout_s=180',
    gpu="flags.max-model-len=8192 workloads.far.prompt_tokens.tokens=4096"
    " workloads.far.prefix.tokens=4032 workloads.tight.prompt_tokens.tokens=4096",
    needs=quantize.LLM_COMPRESSOR,
)
