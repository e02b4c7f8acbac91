from tests.sizes import Sizes, answers_of

SIZES = Sizes(
    fake="attention_tokens=[64,96,128,192] workloads.longest.prompt_tokens.tokens=768"
    " workloads.far.prompt_tokens.tokens=512 workloads.far.prefix.tokens=448"
    f" {answers_of(8, 'near', 'far')}",
    # of three lengths the fit, of two contexts the line
    cpu="attention_tokens=[256,384,512,768] workloads.long.prompt_tokens.tokens=256"
    " workloads.longest.prompt_tokens.tokens=512 workloads.far.prompt_tokens.tokens=512"
    " workloads.far.prefix.tokens=448",
    gpu="flags.max-model-len=8192 workloads.long.prompt_tokens.tokens=4096"
    " workloads.longest.prompt_tokens.tokens=8000 workloads.half.prompt_tokens.tokens=4096"
    " workloads.half.prefix.tokens=4032 workloads.far.prompt_tokens.tokens=8000"
    " workloads.far.prefix.tokens=7936",
)
