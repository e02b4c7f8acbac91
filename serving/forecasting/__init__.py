"""Forecasts: the engine's own scheduler in virtual time over a step timed on the serving device.

`timing` measures the parts of a step, `step` puts a step's time together from them, `traffic` plays
the clients, `virtual_engine` drives vLLM's scheduler, and `plan` is what goes in and comes out.
"""
