from tests.sizes import Sizes, answers_of

SIZES = Sizes(
    fake='warmup_s=0.3 window_s=3 requests=256 workloads.contended.loads=["contended:4/0.5"] '
    + answers_of(12, "contended"),
    # a budget and none: the others differ in a number alone
    cpu='variants=["sixteenth","whole"] window_s=2.5 workloads.contended.loads=["contended:4/1"]',
)
