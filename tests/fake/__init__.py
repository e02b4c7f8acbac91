"""A fake engine with a known latency law, and the labs run end to end on it."""
