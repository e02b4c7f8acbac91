"""Processes that leave no orphan, their ports, and what is asked of them."""
