"""Parts that only a CUDA device needs: the memory that steps take beside the model, and its failures."""
