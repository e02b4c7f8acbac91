from tests.sizes import Sizes, answers_of

SIZES = Sizes(
    fake=answers_of(
        8, "none", "one", "uniform-2", "uniform-4", "uniform-8", "zipf-8", "rank-8", "rank-64"
    ),
    # with one tenant and with all: those between are points of the same curve, and other draws of
    # the same tenants
    cpu='workloads=["none","one","uniform-8","rank-8","rank-64"]',
)
