"""Two runs or more: compared and reproduced."""
