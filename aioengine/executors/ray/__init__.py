"""Tensor-parallel ranks as Ray actors, over the nodes of a cluster."""
