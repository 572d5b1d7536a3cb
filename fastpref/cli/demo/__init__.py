"""`fastpref demo`: a reward model and DPO trained on real text, in minutes, without a network."""
