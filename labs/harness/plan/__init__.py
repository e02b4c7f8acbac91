"""What the reader asked for, resolved and checked before anything starts."""
