"""Models, and what is made of them: smaller, with adapters, pruned, quantized, converted."""
