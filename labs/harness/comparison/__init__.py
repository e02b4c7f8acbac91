"""Two runs or more: compared, gated, and reproduced."""
