"""The harness of every lab: eleven packages, each of which imports only those before it."""
