"""`fastpref check`: every operator and every loss of this machine against float64."""
