from tests.sizes import Sizes

SIZES = Sizes(
    # the record of requests and starts is one engine's: the router has one replica, of which there
    # are no findings
    fake='variants=["direct","passed-on"] workloads=["alone"] findings=[]',
    # two replicas a variant: the other policies differ in a word; each document's first request
    # finds nothing, and in a longer window they are few even where other tests slow the engines
    cpu='window_s=4 variants=["round-robin","cache-aware"] workloads=["documents"]',
)
