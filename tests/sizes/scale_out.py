from tests.sizes import Sizes, answers_of

SIZES = Sizes(
    # the record of requests and starts is one engine's: the router has one replica, and no other
    # joins it
    fake='variants=["one"] workloads=["full","more"] findings=[] probes=[] '
    + answers_of(8, "full", "more"),
    not_real="the router takes the running usage out of a stream: two tokens in a piece count"
    " as one",
)
