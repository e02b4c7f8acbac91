from tests.sizes import Sizes, answers_of

SIZES = Sizes(
    fake='workloads.crowd.loads=["concurrent:24","concurrent:48"] workloads.crowd.warmup_s=0.1 '
    + answers_of(12, "story", "quote", "edit", "code", "alone", "crowd"),
    layers=6,  # of which the draft model takes some
    # `draft-5` is `draft-2` with another number, and other weights are served elsewhere; code and
    # quotes are copied as a text that is edited is
    cpu='variants=["none","ngram","draft-2"] workloads=["story","edit","crowd"]'
    ' workloads.crowd.warmup_s=0.5 workloads.crowd.loads=["concurrent:24"]'
    ' workloads.story.loads=["concurrent:1","concurrent:8"]',
)
