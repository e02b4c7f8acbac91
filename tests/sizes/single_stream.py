from tests.sizes import Sizes, answers_of

SIZES = Sizes(fake="window_s=0.9 " + answers_of(8, "decode"), cpu=answers_of(12, "decode"))
