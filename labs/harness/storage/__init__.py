"""A run's folder: manifest, trials, requests, series and their export."""
