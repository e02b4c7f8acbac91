"""Models made and changed with torch, small enough for seconds; the unit tests need no torch."""
