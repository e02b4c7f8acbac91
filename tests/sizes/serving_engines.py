from tests.sizes import Sizes, answers_of

SIZES = Sizes(
    fake=answers_of(4, "chat"),
    layers=None,  # the text matters
    # the last of four waits for three; a compiled start takes a minute
    cpu='flags.enforce-eager=true variants=["vllm","transformers","llama-cpp"]'
    ' workloads.chat.output_tokens.tokens=6 workloads.chat.loads=["concurrent:1","concurrent:4"]',
)
