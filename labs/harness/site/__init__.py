"""The site: the course, the planner, and the pages of results."""
