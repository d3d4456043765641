"""``aioengine generate``: one prompt, or a batch of requests as JSON lines."""
