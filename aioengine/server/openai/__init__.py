"""The OpenAI-compatible endpoints, and what vLLM adds to them."""
