"""Mixtures of experts: their description, and the layer that sends each token to some experts."""
