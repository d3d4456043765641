"""Speculation: tokens that are proposed from earlier text, and checked all at once in one step."""
