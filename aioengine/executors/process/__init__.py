"""The model in separate processes, one for each tensor-parallel rank."""
