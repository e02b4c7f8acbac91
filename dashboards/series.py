"""The series a dashboard may ask for, by name.

What the load generator exports is named in `loadtests/exporter.py` and what the engine exports in
`serving/metrics.py`; here are the figures of finished runs, loaded back into Prometheus at their
own times, and those of the GPUs.
"""

from __future__ import annotations

from loadtests import exporter

# of a finished run; labels: lab, run_id, machine, and
RUN_INFO = "lab_run_info"  # model, scale, quick, report: 1
MEASUREMENT = "lab_measurement"  # variant, workload, load, metric: the mean over the repeats
MEASUREMENT_LOW, MEASUREMENT_HIGH = f"{MEASUREMENT}_low", f"{MEASUREMENT}_high"  # 95 % interval
EFFECT = "lab_effect"  # claim, title, metric, treatment, baseline: their ratio
EFFECT_LOW, EFFECT_HIGH = f"{EFFECT}_low", f"{EFFECT}_high"
EFFECT_PREDICTED = f"{EFFECT}_predicted"
VERDICT = "lab_verdict"  # claim, title, outcome, held: 1
FORECAST = "lab_forecast"  # variant, workload, load, metric: measured
FORECAST_PREDICTED = f"{FORECAST}_predicted"
SLO = exporter.SLO  # slo (ttft, tpot, itl); without machine while a lab runs
FINISHED = (
    RUN_INFO, MEASUREMENT, MEASUREMENT_LOW, MEASUREMENT_HIGH, EFFECT, EFFECT_LOW, EFFECT_HIGH,
    EFFECT_PREDICTED, VERDICT, FORECAST, FORECAST_PREDICTED, SLO,
)  # fmt: skip

# of a GPU while a lab runs; label gpu beside the lab's
GPU_UTILISATION = "lab_gpu_utilization_ratio"
GPU_POWER = "lab_gpu_power_watts"
GPU_CLOCK = "lab_gpu_sm_clock_hertz"
GPU_MEMORY = "lab_gpu_memory_used_bytes"
GPU_THROTTLED = "lab_gpu_throttled"
GPU_ENERGY = "lab_gpu_energy_joules_total"
GPU = (GPU_UTILISATION, GPU_POWER, GPU_CLOCK, GPU_MEMORY, GPU_THROTTLED, GPU_ENERGY)
