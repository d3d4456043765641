"""Parts of the sampler."""
