"""What is derived from the trials of a run for every lab, and its summary."""
