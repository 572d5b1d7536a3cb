"""Define the cases of `benchmarks/gpu_sweep.py`, and time, check and store them."""
