"""Where adapter versions are, what is pinned, and which moves to start."""
