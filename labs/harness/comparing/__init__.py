"""Two runs or more, side by side: comparisons, gates, reproductions, leaderboards."""
