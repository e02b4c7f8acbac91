from tests.sizes import Sizes

SIZES = Sizes(
    fake='variants=["round-robin","cache-aware"] workloads=["documents"]',
    cpu='variants=["round-robin","cache-aware"] workloads=["documents"]',
)
