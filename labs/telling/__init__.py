"""How a run is told: the summary, the report as Markdown and HTML, the plots."""
