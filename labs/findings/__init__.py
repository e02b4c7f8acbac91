"""This package concludes from a run what its verdicts leave out, one file a lab (`parts.py`).

A lab's file holds what it concludes beyond its claims, its answers to its questions and its own
plots. `quality`, `weights` and `sweep` are what several labs share.
"""
