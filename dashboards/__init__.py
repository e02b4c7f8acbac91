"""Provide Prometheus beside every run, Grafana dashboards as code, and the live page."""
