from tests.sizes import Sizes, answers_of

SIZES = Sizes(
    fake="requests=256 workloads.mixed.output_tokens.mean_tokens=6"
    " workloads.mixed.output_tokens.max_tokens=30"
    " workloads.far.prompt_tokens.tokens=256"
    f" workloads.far.prefix.tokens=192 {answers_of(8, 'near', 'far')}",
    # the other three differ in sizes of the same flags, and in a number that vLLM accepts; more
    # users than the cache holds even while other tests slow the engine and few requests have grown
    cpu='variants=["paged","gqa","mha"] workloads.growing.loads=["concurrent:40"]'
    " workloads.far.prompt_tokens.tokens=1024 workloads.far.prefix.tokens=960",
)
