"""Provide the command line: its commands, and what they print."""
