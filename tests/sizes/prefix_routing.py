from tests.sizes import Sizes

SIZES = Sizes(
    # the record of requests and starts is one engine's: the router has one replica
    fake='variants=["direct","passed-on"] workloads=["alone"]',
    cpu='variants=["round-robin","cache-aware"] workloads=["documents"]'
    " workloads.documents.prefix.groups=4",
)
