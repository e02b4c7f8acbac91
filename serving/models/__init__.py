"""Models: found, made, quantized, pruned and trained."""
