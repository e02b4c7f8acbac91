"""Serving: the machine, the models, the engines' processes and their metrics."""
