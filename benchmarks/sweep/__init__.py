"""What `benchmarks/gpu_sweep.py` varies, and how it times, judges and keeps each variant."""
