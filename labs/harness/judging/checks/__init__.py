"""What the checks of `labs/harness/judging/checks.toml` look at, in modules by what they read."""
