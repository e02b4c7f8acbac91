"""Conclude from a run what its verdicts do not say: one file for each lab (`parts.py`).

A lab's file holds its conclusions beyond its claims, the answers to its questions and its own
plots. `quality`, `weights`, `steps` and `sweep` are shared by several labs.
"""
