"""The cases of `benchmarks/gpu_sweep.py`, and the code that times, judges and stores them."""
