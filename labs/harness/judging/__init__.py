"""Judging turns records into measurements, and measurements into verdicts, where they are valid."""
