"""What is watched: Prometheus beside every run."""
