"""The async shell: one task that drives the core, and the operations that callers await."""
