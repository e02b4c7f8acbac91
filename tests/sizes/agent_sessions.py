from tests.sizes import Sizes

SIZES = Sizes(cpu="warmup_s=4 window_s=4")
