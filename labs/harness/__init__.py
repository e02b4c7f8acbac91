"""Holds what runs, judges, keeps and tells every lab."""
