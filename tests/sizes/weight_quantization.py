from serving.models import quantize
from tests.sizes import Sizes, answers_of

ROUNDED = " ".join(  # in seconds, where calibrating takes minutes
    f"variants.{variant}.weights={weights}"
    for variant, weights in (
        ("w8a8", "w8a8-rtn"), ("w4a16-gptq", "w4a16-rtn"), ("w4a16-awq", "w4a16-rtn")
    )
)  # fmt: skip

SIZES = Sizes(
    fake=answers_of(8, "decode"),
    real=ROUNDED,
    # the others would serve the same weights again, and every variant is asked the same; not every
    # CPU has a kernel for 4 bits
    cpu='variants=["bf16","w8a8","w4a16-gptq"] probed=["bf16","w8a8"]',
    needs=quantize.LLM_COMPRESSOR,
)
