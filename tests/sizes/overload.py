from tests.sizes import Sizes, answers_of

LOADS = 'workloads.mixed.loads=["capacity:0.7","capacity:1.3","capacity:2"] '

SIZES = Sizes(
    fake="warmup_s=0.3 window_s=1.6 requests=256 slo.ttft_s=0.4 flags.max-num-seqs=4"
    " variants.capped.flags.max-num-queued-reqs=6"
    f' workloads.saturated.loads=["concurrent:6"] {LOADS}'
    + answers_of(32, "saturated", "mixed", "classes", "flood", "rising"),
    # the other variants differ in sizes of the same flags; one request may wait, so that some are
    # turned away even where other tests disturbed the trial that the capacity is taken from, and in
    # the longer window some are let in even where other tests take most of the processor
    cpu='window_s=4 requests=1024 variants=["unbounded","capped","priority"]'
    " variants.capped.flags.max-num-queued-reqs=9"
    ' workloads.mixed.loads=["capacity:0.7","capacity:2"]',
)
