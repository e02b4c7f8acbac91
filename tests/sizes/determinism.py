from tests.sizes import Sizes, answers_of

SIZES = Sizes(
    # an engine whose answers part where they share a step; the others are asked the same
    fake='variants=["plain","cached"] probed=["plain"] ' + answers_of(8, "answers"),
    # the cached engine differs in a flag that other labs turn, and INT8 weights take minutes
    cpu='variants=["plain","chunked","speculation"]',
)
