"""The operators on a CPU: native C++ where a compiler is installed, the PyTorch of `eager` where none is."""

from fastpref_kernels.cpu.build import loaded, native

__all__ = ["loaded", "native"]
