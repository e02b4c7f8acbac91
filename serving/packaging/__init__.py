"""The environment: its installation and its locked versions."""
