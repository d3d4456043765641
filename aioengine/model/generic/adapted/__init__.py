"""Adapters on the modules of a model that transformers runs: on linears, and on bare parameters."""
