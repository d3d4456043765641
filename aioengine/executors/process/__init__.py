"""The model in processes of its own, one for each tensor-parallel rank."""
