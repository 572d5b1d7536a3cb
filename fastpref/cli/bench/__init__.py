"""`fastpref bench`."""
