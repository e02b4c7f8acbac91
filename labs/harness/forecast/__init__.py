"""Forecasts of loads and capacity before a run, and their validation by published runs."""
