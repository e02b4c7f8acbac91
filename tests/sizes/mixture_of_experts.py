from tests.sizes import Sizes, answers_of

SIZES = Sizes(
    fake=answers_of(8, "decode"),
    layers=None,  # it serves a shape of its own, and names no model
    # the dense model with one token's parameters shows no other kind of engine than the other one
    cpu='variants=["mixture","dense-total"] ' + answers_of(8, "decode"),
)
