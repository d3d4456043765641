"""``/v1/messages``, which Anthropic's clients use."""
