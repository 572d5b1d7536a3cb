"""`fastpref doctor`: what will run on this machine, and why."""
