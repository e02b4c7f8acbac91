"""What a run tells beyond its verdicts: one file a lab, found by the lab's name (`parts.py`).

A lab's file holds what it concludes beyond its claims, its answers to its questions and its own
plots. `quality`, `weights` and `sweep` are what several labs share.
"""
