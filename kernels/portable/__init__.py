"""Backend in plain torch, for devices and machines without compiled kernels."""
