"""CPU kernels: a small C++ library, compiled on the machine that runs it, called through ctypes."""
