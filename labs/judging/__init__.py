"""Whether it is so: measurements from records, statistics, validity, quality."""
