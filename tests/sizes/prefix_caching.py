from tests.sizes import Sizes

SHARED_TOKENS = {
    "share-0": 0, "share-50": 64, "share-90": 98, "share-97": 106, "few": 98, "many": 98,
    "documents": 96, "shuffled": 96,
}  # fmt: skip

SIZES = Sizes(
    fake=" ".join(
        f"workloads.{name}.prompt_tokens.tokens=128"
        + (f" workloads.{name}.prefix.tokens={shared}" if shared else "")
        for name, shared in SHARED_TOKENS.items()
    )
    + " workloads.chat.prompt_tokens.tokens=64 workloads.chat.chat.grows_tokens=40",
    # without points of the curve of shares, and prefixes that fit, as that of `share-90` does; that
    # more prefixes than the cache holds gain nothing is played on the fake engine
    cpu='workloads=["share-0","share-90","documents","shuffled","chat"]'
    ' workloads.documents.only=["on"] workloads.share-0.loads=["concurrent:1"]',
)
