from tests.sizes import Sizes, answers_of

SIZES = Sizes(
    fake=answers_of(8, "decode"),
    # the pattern is made and read in unit tests; a second pruned engine shows the same as the first
    cpu='variants=["dense","wanda-50"]',
)
