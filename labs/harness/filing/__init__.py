"""Files the results: the folder of a run, its manifest, and exports of it."""
