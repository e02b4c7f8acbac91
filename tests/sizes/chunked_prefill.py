from tests.sizes import Sizes

SIZES = Sizes(
    fake='warmup_s=0.3 window_s=3 requests=256 workloads.contended.loads=["contended:4/0.5"]'
    " workloads.contended.output_tokens.mean_tokens=12"
    " workloads.contended.output_tokens.max_tokens=36",
    # a budget and none: the others differ in a number alone
    cpu='variants=["sixteenth","whole"] window_s=2.5 workloads.contended.loads=["contended:4/1"]',
)
