"""Ways to quantize a Hugging Face checkpoint: one a file."""
