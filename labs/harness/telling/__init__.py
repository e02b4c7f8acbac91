"""Report a run: the summary, the report as Markdown and HTML, the plots."""
