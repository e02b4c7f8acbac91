"""The run itself: resolve, predict, start engines, play the trials, probe."""
