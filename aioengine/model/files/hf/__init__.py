"""A Hugging Face ``config.json``: typed access, the native families, and rotary positions."""
