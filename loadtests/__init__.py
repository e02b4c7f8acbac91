"""Sends the load: workloads, arrivals, prompts, Locust, and the record of every request."""
