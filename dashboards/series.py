"""The series a dashboard may ask for, by name.

The load generator's are named in `loadtests/exporter.py`, the engine's in `serving/metrics.py`, the
GPUs' in `serving/hardware/telemetry.py`; here are those of finished runs, which `make import`
loads into Prometheus at the times of the runs.
"""

from __future__ import annotations

from loadtests import exporter
from serving import metrics

# of a finished run; labels: lab, run_id, machine, and
RUN_INFO = "lab_run_info"  # model, scale, quick, report: 1
MEASUREMENT = "lab_measurement"  # variant, workload, load, metric, unit: a point's figure
MEASUREMENT_LOW, MEASUREMENT_HIGH = f"{MEASUREMENT}_low", f"{MEASUREMENT}_high"  # 95% interval
EFFECT = "lab_effect"  # claim, title, metric, treatment, baseline: their ratio
EFFECT_LOW, EFFECT_HIGH = f"{EFFECT}_low", f"{EFFECT}_high"
EFFECT_PREDICTED = f"{EFFECT}_predicted"
VERDICT = "lab_verdict"  # claim, title, outcome, prediction: when it was reached, Unix time
FORECAST = "lab_forecast"  # variant, workload, load, metric, unit: measured
FORECAST_PREDICTED = f"{FORECAST}_predicted"
FORECAST_OUTCOME = f"{FORECAST}_outcome"  # and prediction: when it was judged, Unix time
SLO = exporter.SLO  # slo (ttft, tpot, itl); without machine while a lab runs
FINISHED = (
    RUN_INFO, MEASUREMENT, MEASUREMENT_LOW, MEASUREMENT_HIGH, EFFECT, EFFECT_LOW, EFFECT_HIGH,
    EFFECT_PREDICTED, VERDICT, FORECAST, FORECAST_PREDICTED, FORECAST_OUTCOME, SLO,
)  # fmt: skip

# of an engine; what panels ask for once a run is on file, of histograms the sums and counts alone
ENGINE_KEPT = (
    metrics.RUNNING, metrics.WAITING, metrics.KV_USAGE, metrics.PREEMPTIONS,
    metrics.PREFIX_QUERIES, metrics.PREFIX_HITS, metrics.REQUESTS,
    f"{metrics.STEP_TOKENS}_sum", f"{metrics.STEP_TOKENS}_count",
    metrics.SPEC_DRAFTS, metrics.SPEC_ACCEPTED, metrics.SPEC_ACCEPTED_AT,
)  # fmt: skip
