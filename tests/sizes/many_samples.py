from tests.sizes import Sizes, answers_of

SIZES = Sizes(
    fake=answers_of(8, "one", "apart", "together", "many", "many-together")
    + ' workloads.many.samples.count=16 workloads.many.loads=["waves:16"]'
    " workloads.many-together.samples.count=16 claims.many-together.baseline.load=waves:16",
    # more samples are a point of the same curve
    cpu='workloads=["one","apart","together"] '
    + answers_of(8, "one", "apart", "together")
    + "".join(f" workloads.{n}.prompt_tokens.tokens=96" for n in ("one", "apart", "together")),
)
