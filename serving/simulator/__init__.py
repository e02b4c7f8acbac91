"""Time without the hardware: vLLM's scheduler in virtual time, and what a step takes."""
