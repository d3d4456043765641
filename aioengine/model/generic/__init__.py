"""Decoders that transformers runs, module by module, on the engine's cache, batches and adapters."""
