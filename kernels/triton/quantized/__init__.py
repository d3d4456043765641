"""Linears whose weights are quantized, in Triton."""
