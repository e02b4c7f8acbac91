"""A run as Markdown, HTML, plots, and text on a terminal."""
