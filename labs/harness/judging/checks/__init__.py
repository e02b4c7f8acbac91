"""What the checks of `labs/harness/judging/validity.py` look at, in modules by what they read."""
