from tests.sizes import Sizes, answers_of

SIZES = Sizes(fake=answers_of(8, "decode"))
