"""A run: engines, load, trials and probes."""
