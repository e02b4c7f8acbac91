"""What is kept: the folder of a run, its manifest, what is exported of it."""
