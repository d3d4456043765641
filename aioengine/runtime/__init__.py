"""The async shell: one task that drives the core, and what callers await of it."""
