"""What the checks of `labs/harness/analysis/checks.toml` look at, in modules by what they read."""
