from tests.sizes import Sizes, answers_of

SIZES = Sizes(
    fake="workloads.far.prompt_tokens.tokens=512 workloads.far.prefix.tokens=448"
    ' workloads.growing.loads=["concurrent:4","concurrent:16"]'
    " claims.batch.treatment.load=concurrent:16 claims.batch.baseline.load=concurrent:16 "
    + " ".join(
        f"variants.{name}.flags.kv-cache-memory-bytes={32 * 2**20}"
        for name in ("bf16-tight", "fp8-tight")
    )
    + f" {answers_of(8, 'near', 'far')} {answers_of(48, 'growing')}",
    # `fp8-tight` is `fp8` with less memory, as `bf16-tight` is; `test_forecasting.py` times the
    # kernels of `e5m2`, which is `fp8` with another word
    cpu='variants=["bf16","fp8","bf16-tight"] probed=["bf16","fp8"]'
    " workloads.far.prompt_tokens.tokens=1024 workloads.far.prefix.tokens=960",
    gpu="flags.max-model-len=8192 workloads.far.prompt_tokens.tokens=7168"
    " workloads.far.prefix.tokens=7104",
)
