"""`fastpref bench`: measure fastpref beside the installed peers."""
