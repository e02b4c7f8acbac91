from tests.sizes import Sizes, answers_of

SIZES = Sizes(
    fake=answers_of(8, "decode"),
    not_real="setting up four tools and calibrating with each takes half an hour; what it adds to"
    " the lab of weight quantization, a list of weights and a finding, runs on the fake engine",
)
