from tests.sizes import Sizes


def answers_up_to(tokens: int, *workloads: str) -> str:
    """Answers of so many tokens or fewer, ten milliseconds each: most end within the window."""
    lengths = {"mean_tokens": tokens, "max_tokens": tokens}
    return " ".join(
        f"workloads.{name}.output_tokens.{bound}={length}"
        for name in workloads
        for bound, length in lengths.items()
    )


SIZES = Sizes(
    fake='warmup_s=0.3 window_s=1 requests=192 workloads.burst.loads=["waves:12"]'
    ' workloads.neighbour.loads=["contended:3/0.4"]'
    " claims.neighbour.treatment.load=contended:3/0.4 "
    + answers_up_to(8, "burst", "cold", "neighbour", "context")
    + " "
    + answers_up_to(48, "reference", "usual"),  # so long that two outgrow the small KV cache
    # the other engines differ from these in a flag that another lab's test sets as well
    cpu='variants=["healthy","small-kv"] workloads=["reference","usual","cold"] window_s=2',
)
