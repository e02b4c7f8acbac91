from tests.sizes import Sizes, answers_of

SIZES = Sizes(
    fake='workloads.crowd.loads=["concurrent:24","concurrent:48"] workloads.crowd.warmup_s=0.1 '
    + answers_of(12, "story", "quote", "alone", "crowd"),
    cpu="workloads.crowd.warmup_s=0.5",
)
