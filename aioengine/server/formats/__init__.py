"""Forms of tool calls and reasoning by family of models, one file each; registry.py has their names."""
