"""A reward model, PPO and DPO trained on real text, in minutes and without a network: `make demo`."""
