"""What runs inside the processes of engines: the guard, their start, vLLM's extensions."""
