"""The machine: what it is, its ceilings, and how it fares while an engine serves."""
