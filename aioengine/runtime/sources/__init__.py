"""Sources of adapters: look-ups by name, adapters given in memory, and mixes of adapters."""
