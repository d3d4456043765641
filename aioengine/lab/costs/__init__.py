"""Cost models: how long steps, reads and copies take in simulated time."""
