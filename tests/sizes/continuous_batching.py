from tests.sizes import Sizes

SIZES = Sizes(
    fake="warmup_s=0.15 window_s=0.7 repeats=2 most_repeats=0 requests=128"
    " workloads.exponential.output_tokens.mean_tokens=12"
    " workloads.exponential.output_tokens.max_tokens=48"
    ' workloads.exponential.loads=["concurrent:1","concurrent:8","waves:8","concurrent:16",'
    '"poisson:8"]',
    layers=None,  # as a reader runs it
    # answers of one length are served in `test_copies.py`; two requests a second are sent in the
    # window; the dashboards are to see a warm-up
    cpu='repeats=1 warmup_s=1.5 window_s=3 workloads=["exponential"]'
    ' workloads.exponential.loads=["concurrent:1","concurrent:8","waves:8","concurrent:16",'
    '"poisson:2"]',
)
