"""Forecasts: the engine's own scheduler in virtual time over a step timed on the serving device."""
