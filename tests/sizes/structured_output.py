from tests.sizes import Sizes

SIZES = Sizes(
    # two backends and one form: the others differ in a word
    fake='variants=["xgrammar","outlines"] probes=["structures-quick"]'
    ' workloads=["asked","imposed","asked-alone","imposed-alone","seen","unseen"]',
    layers=None,  # the text matters
    # the study times all backends
    cpu='variants=["xgrammar"] workloads=["asked","imposed","seen","unseen"]',
)
