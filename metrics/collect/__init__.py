"""Listeners that count engine events, and what is read from the engine when it is scraped."""
