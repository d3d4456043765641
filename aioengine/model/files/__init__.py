"""Model files: where they are found, and their configurations and weights read."""
