"""Places of adapter versions, pins, and the moves to start."""
