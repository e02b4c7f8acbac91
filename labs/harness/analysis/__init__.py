"""From a trial's records to metrics, validity checks, treatment checks and verdicts."""
