"""Triton kernels and their launchers, for CUDA, ROCm and XPU devices."""
