"""Programs that are started, and how they end: make, pip, git, load processes, guards, commands."""
