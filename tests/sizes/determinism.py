from tests.sizes import Sizes, answers_of

SIZES = Sizes(
    # an engine whose answers part where they share a step; the others are asked the same
    fake='variants=["plain","cached"] probed=["plain"] ' + answers_of(8, "answers"),
    # other labs turn the flags of the others, and INT8 weights take minutes
    cpu='variants=["plain","speculation"] probed=["plain"]',
)
