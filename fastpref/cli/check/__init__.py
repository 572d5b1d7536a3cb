"""`fastpref check`: judge every operator and every loss against float64 on this machine."""
