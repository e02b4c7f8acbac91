"""What is served: the machine, the models, the engine process and its metrics."""
