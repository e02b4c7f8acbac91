from tests.sizes import Sizes, answers_of

SIZES = Sizes(
    fake='warmup_s=0.3 window_s=1 requests=192 workloads.burst.loads=["waves:12"]'
    ' workloads.neighbour.loads=["contended:3/0.4"]'
    " claims.neighbour.treatment.load=contended:3/0.4 "
    + answers_of(8, "burst", "cold", "neighbour", "context")
    + " "
    + answers_of(40, "reference", "usual"),  # so long that two outgrow the small KV cache
    # the other engines differ from these in a flag that another lab's test sets as well
    cpu='variants=["healthy","small-kv"] workloads=["reference","usual","cold"] window_s=2',
)
