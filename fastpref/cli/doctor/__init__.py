"""`fastpref doctor`: report what runs on this machine, what is missing, and how to fix it."""
