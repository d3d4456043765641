"""Forms in which families of models write calls of tools and reasoning, one file each; registry.py has their names."""
